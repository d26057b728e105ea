"""``python -m flash_jax bench`` measures what it says, shows it and saves it."""

import json
import sys

import numpy as np
import pytest
from small_bench import SMALL, fake

from flash_jax.__main__ import main
from flash_jax._cli import commands
from flash_jax._cli.bench import available, measure, report
from flash_jax._cli.bench.cases import CASES
from flash_jax._cli.bench.subjects import MACHINE, OURS, OURS_INT8, SUBJECTS, TORCH


def test_ratios_are_medians_of_ratios_within_rounds():
    result = lambda *seconds: measure.Result(np.array(seconds), None, None, 0.0)  # noqa: E731
    results = {OURS: result(1.0, 2.0, 4.0), "jax.nn": result(3.0, 4.0, 40.0)}
    comparison = measure.Comparison(SMALL["full"], results, np.full(3, 1e9))
    assert comparison.ratio("jax.nn") == 3
    assert comparison.rate(OURS) == SMALL["full"].flops / 2
    assert comparison.of_best("jax.nn") == SMALL["full"].flops / 4 / 1e9
    assert all(len(row) == len(report.HEADER) for row in report.rows(comparison))


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
