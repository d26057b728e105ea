"""``python -m flash_jax bench`` measures what it says, shows it and saves it."""

import contextlib
import functools
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from gradient_oracle import attention_gradients
from oracle import attention
from unoptimized import UNOPTIMIZED

from flash_jax.__main__ import main
from flash_jax._cli import commands
from flash_jax._cli.bench import available, exact, measure, processes, report
from flash_jax._cli.bench.cases import CASES, Case, in_dtypes, over_devices, twin
from flash_jax._cli.bench.exact import exact_rows, random_inputs
from flash_jax._cli.bench.processes import Worker, WorkerError
from flash_jax._cli.bench.subjects import MACHINE, OURS, OURS_INT8, SUBJECTS, TORCH, Entry, versions

SMALL = {
    "full": Case("full", "small", 2, 19, 4, 4, 16),
    "causal": Case("causal", "small", 1, 19, 4, 4, 16, True),
    "gqa": Case("gqa", "small", 2, 19, 4, 2, 16, True),
    "window": Case("window", "small", 1, 19, 2, 2, 16, True, window=4),
    "packed": Case("packed", "small", 1, 12, 2, 2, 16, True, documents=3),
    "padded": Case("padded", "small", 2, 19, 2, 2, 16, filled=(5, 9)),
    "decode": Case("decode", "small", 2, 1, 4, 2, 16, keys=29),
    "train": Case("train", "small", 1, 19, 4, 2, 16, True, gradient=True),
    "bf16": Case("bf16", "small", 1, 19, 2, 2, 16, dtype="bfloat16"),
}
HELPERS = Path(__file__).parents[1] / "helpers"


def fake(function, **fields):
    """A subject of helpers/bench_subjects.py."""
    return Entry("bench_subjects", function, lambda _: True, ("numpy",), **fields)


@pytest.fixture
def fakes(monkeypatch):
    """Workers find the fake subjects; what bounds a case is one of them, too."""
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    monkeypatch.setattr(measure, "MACHINE", fake("right"))


def by_case():
    return pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


def test_the_names_of_cases_are_their_own():
    assert all(name == case.name for name, case in CASES.items())
    assert all(case.why for case in CASES.values())


def test_every_case_has_a_twin_in_bfloat16():
    both = [x for case in CASES.values() for x in in_dtypes(case, "both")]
    assert len({x.name for x in both}) == 2 * len(CASES)
    for case in CASES.values():
        one, other = in_dtypes(case, "both")
        assert [one] == in_dtypes(case, "float32") == [case]
        assert [other] == in_dtypes(case, "bfloat16")
        assert other._replace(name=case.name, dtype="float32") == case
        assert SUBJECTS["jax.nn"].can(case) == SUBJECTS["jax.nn"].can(other)
        assert SUBJECTS[TORCH].can(case) == SUBJECTS[TORCH].can(other)
        assert SUBJECTS["OpenVINO"].can(case) == SUBJECTS["OpenVINO bf16"].can(other)


@by_case()
def test_operations_are_those_of_the_kept_pairs(case):
    kept = np.zeros((case.B, case.T, case.S))
    for b in range(case.B):
        for t in range(case.T):
            for s in range(case.S):
                inside = not case.is_causal or s <= t
                if case.window is not None:
                    inside &= s >= t - case.window
                if case.documents > 1:
                    inside &= t // 4 == s // 4
                if case.filled is not None:
                    inside &= s < case.filled[b]
                kept[b, t, s] = inside
    products = 7 if case.gradient else 2
    assert case.flops == 2 * products * case.N * case.H * kept.sum()


@by_case()
def test_the_exact_rows_are_those_of_the_oracle(case):
    inputs = random_inputs(case)
    rows = np.array([0, min(4, case.T - 1)])
    found = exact_rows(case, rows, inputs)
    q, k, v, *cotangent = inputs
    output, lse = attention(q, k, v, is_causal=case.is_causal, **case.options)
    np.testing.assert_allclose(found[0], output[:, rows], atol=1e-12)
    assert len(found) == 1 + len(cotangent) == 1 + case.gradient
    for do in cotangent:
        kept = np.broadcast_to(np.tri(case.T, dtype=bool), (case.B, case.N, case.T, case.S))
        gradients = attention_gradients(q, k, v, do, np.zeros_like(lse), kept)
        np.testing.assert_allclose(found[1], gradients["query"].exact[:, rows], atol=1e-12)


def test_inputs_of_bfloat16_are_those_of_float32_rounded_as_jax_rounds():
    narrow, wide = SMALL["bf16"], SMALL["bf16"]._replace(dtype="float32")
    for x, y in zip(random_inputs(narrow), random_inputs(wide), strict=True):
        np.testing.assert_array_equal(x, np.asarray(jax.numpy.asarray(y, "bfloat16"), np.float32))
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], np.float32)
    np.testing.assert_array_equal(exact.to_bfloat16(halves), [1, 1 + 2**-6, -1])


def test_checked_rows_are_no_padding():
    assert exact.checked_rows(SMALL["padded"]).tolist() == list(range(5))


# Each subject once, what it takes beside the plain case included. Another Python may have PyTorch.
BUILDS = [
    (OURS, "train"),
    (OURS_INT8, "bf16"),
    ("jax.nn", "train"),
    (TORCH, "train"),
    (TORCH, "window"),
    (TORCH, "bf16"),
    ("ONNX Runtime", "full"),
    ("ONNX Runtime", "gqa"),
    ("ONNX Runtime cache", "decode"),
    ("ONNX Runtime cache fp16", "decode-bf16"),
    ("ONNX Runtime cache int8", "decode"),
    ("OpenVINO", "causal"),
    ("OpenVINO bf16", "bf16"),
]


@pytest.mark.parametrize(("name", "case"), BUILDS)
def test_a_subject_gives_the_exact_results_of_a_case(name, case, monkeypatch):
    entry, case = SUBJECTS[name], (SMALL | {"decode-bf16": twin(SMALL["decode"])})[case]
    for module, version in versions(entry.needs).items():
        if version is None:
            pytest.skip(f"{module} is in the extra `bench`")
    fast = functools.partialmethod(jax.stages.Lowered.compile, compiler_options=UNOPTIMIZED)
    monkeypatch.setattr(jax.stages.Lowered, "compile", fast)
    assert entry.can(case)
    inputs = random_inputs(case)
    module = importlib.import_module(entry.module, processes.__package__)
    subject = getattr(module, entry.function)(case, inputs)
    subject.run()
    wanted = exact_rows(case, np.arange(case.T), inputs)
    np.testing.assert_allclose(subject.results(), wanted, atol=entry.tolerance(case))


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        (OURS, list(SMALL)),
        (OURS_INT8, [name for name in SMALL if name != "train"]),
        ("jax.nn", [name for name in SMALL if name != "packed"]),
        (TORCH, ["full", "causal", "gqa", "window", "decode", "train", "bf16"]),
        ("ONNX Runtime", ["full", "causal", "gqa"]),
        ("ONNX Runtime cache int8", ["decode"]),
        ("OpenVINO", ["full", "causal"]),
        ("OpenVINO bf16", ["bf16"]),
    ],
)
def test_subjects_know_what_they_can_do(name, cases):
    assert [x for x, case in SMALL.items() if SUBJECTS[name].can(case)] == cases


def test_devices_divide_the_batch_then_heads_then_queries():
    divided = {name: over_devices(case, 2).divided for name, case in SMALL.items()}
    by_heads = dict.fromkeys(("causal", "window", "packed", "train", "bf16"), (1, 2, 1))
    assert divided == dict.fromkeys(SMALL, (2, 1, 1)) | by_heads
    assert over_devices(SMALL["packed"], 6).divided == (1, 2, 3)
    assert over_devices(SMALL["gqa"], 3) == SMALL["gqa"]  # none is a multiple
    titles = [report.title(over_devices(SMALL["packed"], n)) for n in (6, 1)]
    assert titles[0].endswith(", float32, 6 devices: heads / 2, queries / 3")
    assert titles[1].endswith(", float32")


@pytest.mark.parametrize("name", [OURS, "jax.nn"])
def test_divided_work_gives_the_exact_results(name, tmp_path):
    case, file = over_devices(SMALL["train"], 2), tmp_path / "results.npy"
    with contextlib.closing(Worker(SUBJECTS[name], tmp_path / "log")) as worker:
        worker.build(SUBJECTS[name], case, file)
        assert worker.round()
    exact_ = exact_rows(case, exact.checked_rows(case), random_inputs(case))
    np.testing.assert_allclose(np.load(file), exact_, atol=SUBJECTS[name].tolerance(case))


def test_ratios_are_medians_of_ratios_within_rounds():
    result = lambda *seconds: measure.Result(np.array(seconds), None, None, 0.0)  # noqa: E731
    results = {OURS: result(1.0, 2.0, 4.0), "jax.nn": result(3.0, 4.0, 40.0)}
    comparison = measure.Comparison(SMALL["full"], results, np.full(3, 1e9))
    assert comparison.ratio("jax.nn") == 3
    assert comparison.rate(OURS) == SMALL["full"].flops / 2
    assert comparison.of_best("jax.nn") == SMALL["full"].flops / 4 / 1e9
    assert all(len(row) == len(report.HEADER) for row in report.rows(comparison))


@pytest.mark.usefixtures("fakes")
def test_what_fails_is_told_and_the_others_are_measured():
    wrong = ("off", "not_a_number", "short")
    peers = {name: fake(name) for name in (*wrong, "refuses", "dies", "dies_later", "talks")}
    found = measure.compare(SMALL["train"], 2, {OURS: fake("right"), **peers})
    assert list(found.results) == [OURS, *wrong, "talks"]
    assert all(result.seconds.shape == (2,) for result in found.results.values())
    assert all((result.seconds > 0).all() for result in found.results.values())
    assert found.results[OURS].error < 1e-6
    assert found.results[OURS].temporary_bytes == 2**20
    assert found.results["off"].error == pytest.approx(0.5)
    last_words = "its process ended with code 3; it last wrote: out of memory"
    assert found.failures == {
        "refuses": "ValueError: no such luck",
        "dies": last_words,
        "dies_later": last_words,
        "off": "its result is off by 5.0e-01; allowed is 1e-04",
        "not_a_number": "its result is off by nan; allowed is 1e-04",
        "short": "its result is off by inf; allowed is 1e-04",
    }
    assert "off failed in train: its result is off by 5.0e-01; allowed is 1e-04" in (
        report.failures([found])
    )


@pytest.mark.usefixtures("fakes")
def test_nothing_is_compared_with_a_flash_jax_that_fails():
    with pytest.raises(WorkerError, match="flash_jax failed in full: ValueError: no such luck"):
        measure.compare(SMALL["full"], 1, {OURS: fake("refuses")})


def test_a_coarse_format_may_be_off_by_more():
    assert fake("off").tolerance(SMALL["full"]) < fake("off").tolerance(SMALL["bf16"])
    assert fake("off", coarse=0.75).tolerance(SMALL["bf16"]) == 0.75


def comes_to(pid, states):
    """Whether a process comes to one of these states of Linux within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "gone"
        if state in states:
            return True
        time.sleep(0.01)
    return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")


@linux
@pytest.mark.usefixtures("fakes")
def test_a_worker_sleeps_unless_it_is_asked(tmp_path):
    with contextlib.closing(Worker(fake("right"), tmp_path / "log")) as worker:
        worker.build(fake("right"), SMALL["full"], tmp_path / "rows.npy")
        for _ in range(2):
            assert comes_to(worker.process.pid, "T")
            assert min(worker.round()) > 0
    assert worker.process.returncode is not None


def run_without_jax(code):
    """What a script prints that has the benchmark's folder as a package ``bench``."""
    start = f"import sys; sys.path.insert(0, {str(Path(commands.__file__).parent)!r})\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    return done.stdout


@linux
def test_a_sleeping_worker_ends_with_its_parent(tmp_path):
    code = f"""
import os, pathlib
from bench import processes, subjects
worker = processes.Worker(subjects.SUBJECTS["PyTorch"], pathlib.Path({str(tmp_path / "log")!r}))
worker.ask({{"versions": []}})
print(worker.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    assert comes_to(int(run_without_jax(code)), ("Z", "X", "gone"))


def test_a_worker_of_a_peer_imports_neither_jax_nor_flash_jax():
    code = (
        "import bench.worker, bench.peers, bench.exact\n"
        "print({x.split('.')[0] for x in sys.modules} & {'bench', 'jax', 'flash_jax'})"
    )
    assert run_without_jax(code) == "{'bench'}\n"


def test_what_is_not_installed_is_left_out_and_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    subjects, found = available.available()
    assert "ONNX Runtime" not in subjects
    assert found["onnx"] == "not installed"
    assert list(subjects)[:3] == [OURS, OURS_INT8, "jax.nn"]


def test_another_python_may_have_torch(monkeypatch, tmp_path):
    for module in ("torch", "torch-9.9.dist-info"):
        (tmp_path / module).mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch-9.9.dist-info/METADATA").write_text("Name: torch\nVersion: 9.9\n")
    monkeypatch.setitem(sys.modules, "torch", None)  # this one has none
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    subjects, found = available.available(sys.executable)
    assert subjects[TORCH].python == sys.executable
    assert list(subjects) == [name for name in SUBJECTS if name in subjects]
    assert found["torch"] == "9.9"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "No such file or directory"),
        ("exit 1", "its process ended with code 1; it last wrote: nothing"),
        ("echo hello", "it answers 'hello'"),
        ('echo \'{"ok": {"torch": null, "Python": "3.9"}}\'; sleep 60', "it has no torch"),
    ],
)
def test_a_python_without_torch_is_refused(script, message, tmp_path, capsys):
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    assert main(["bench", "full-2k", "--torch-python", str(python)]) == 2
    wanted = "--torch-python must be a Python that has torch and numpy"
    assert f"{wanted}; {str(python)!r}: {message}" in capsys.readouterr().err


@pytest.fixture
def small_bench(fakes, monkeypatch):
    """The command on small cases: flash_jax in earnest, and a peer that is a fake."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(commands, "CASES", SMALL)
    monkeypatch.setattr(commands, "LENGTHS", (5,))
    subjects = {OURS: SUBJECTS[OURS], "PyTorch": fake("right")}
    monkeypatch.setattr(commands, "available", lambda _: (subjects, {"torch": "9.9"}))


@pytest.mark.usefixtures("small_bench")
def test_bench_measures_flash_jax_beside_a_peer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "MACHINE", MACHINE)
    saved = tmp_path / "bench.json"
    assert main(["bench", "decode", "--rounds", "2", "--json", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "decode: small; 2 x 4/2 x 1 of 29 x 16, float32" in out
    assert "torch" in out
    assert "cores" in out
    assert "GB/s" in out
    data = json.loads(saved.read_text())
    assert data["environment"]["jax"]
    assert data["environment"]["torch"] == "9.9"
    (case,) = data["cases"]
    assert case["name"] == "decode"
    assert case["cores"] >= 1
    assert list(case["subjects"]) == [OURS, "PyTorch"]
    assert len(case["subjects"][OURS]["seconds"]) == 2
    assert case["subjects"][OURS]["temporary_bytes"] >= 0
    assert case["failures"] == {}


@pytest.mark.usefixtures("small_bench")
def test_bench_draws_a_figure_and_fails_if_a_result_is_wrong(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `plot`")
    subjects = {OURS: fake("right"), "PyTorch": fake("off")}
    monkeypatch.setattr(commands, "available", lambda _: (subjects, {}))
    figure = tmp_path / "bench.png"
    options = ["--dtype", "both", "--rounds", "1", "--plot", str(figure)]
    assert main(["bench", "causal", *options]) == 1
    out = capsys.readouterr().out
    assert "causal: small; 4 x 19 x 16, float32" in out
    assert "causal-bf16: small; 4 x 19 x 16, bfloat16" in out
    assert "GFLOP/s" in out
    assert "PyTorch failed in causal-bf16: its result is off by" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_bench")
def test_bench_ends_if_flash_jax_fails(monkeypatch, capsys):
    monkeypatch.setattr(commands, "available", lambda _: ({OURS: fake("dies")}, {}))
    assert main(["bench", "full"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("python -m flash_jax bench: error: flash_jax failed in full: its process")
    assert err.count("\n") == 1


def test_list_shows_the_cases(capsys):
    assert main(["bench", "--list"]) == 0
    assert all(
        case.why in line
        for case, line in zip(CASES.values(), capsys.readouterr().out.splitlines()[2:], strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such"], "CASE must be one of full-2k"),
        (["full-2k", "--json", "/no/such/folder/x.json"], "--json must be a writable file"),
        (["full-2k", "--plot", "x.txt"], "--plot must end in one of"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_measured(
    arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(commands, "compare", lambda *_: pytest.fail("measured"))
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
