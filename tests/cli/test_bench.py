"""``python -m flash_jax bench`` measures what it says, shows it and saves it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from oracle import attention

from flash_jax.__main__ import main
from flash_jax._cli import commands
from flash_jax._cli.bench import measure, report
from flash_jax._cli.bench.cases import CASES, Case, packed, padded
from flash_jax._cli.bench.measure import compare, exact_rows
from flash_jax._cli.bench.subjects import OURS, OURS_INT8, SUBJECTS, random_inputs

SMALL = {
    "full": Case("full", "small", 2, 19, 4, 4, 16),
    "causal": Case("causal", "small", 1, 19, 4, 4, 16, True),
    "gqa": Case("gqa", "small", 2, 19, 4, 2, 16, True),
    "window": Case("window", "small", 1, 19, 2, 2, 16, True, {"local_window_size": (4, 0)}),
    "packed": Case("packed", "small", 1, 12, 2, 2, 16, True, packed(3, 4)),
    "padded": Case("padded", "small", 2, 19, 2, 2, 16, False, padded([5, 9])),
    "decode": Case("decode", "small", 2, 1, 4, 2, 16, keys=29),
    "gradient": Case("gradient", "small", 1, 19, 2, 2, 16, True, gradient=True),
    "bfloat16": Case("bfloat16", "small", 1, 19, 2, 2, 16, dtype="bfloat16"),
}
COARSE = {OURS_INT8: 0.03, "OpenVINO bf16": 0.03}


def by_case():
    return pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


@by_case()
def test_every_subject_gives_the_exact_result_of_the_case(case):
    comparison = compare(case, rounds=2)
    assert OURS in comparison.results
    assert (OURS_INT8 in comparison.results) != case.gradient
    for name, result in comparison.results.items():
        bound = 0.03 if case.dtype == "bfloat16" else COARSE.get(name, 1e-5)
        assert result.error < bound, name
        assert result.seconds.shape == (2,)
        assert (result.seconds > 0).all()
        assert comparison.rate(name) > 0
        assert comparison.of_best(name) > 0
    assert comparison.ratio(OURS) == 1


@by_case()
def test_the_exact_rows_are_those_of_the_oracle(case):
    inputs = random_inputs(case)
    rows = np.array([0, min(4, case.T - 1)])
    exact = attention(*inputs, is_causal=case.is_causal, **case.options)[0]
    np.testing.assert_allclose(exact_rows(case, rows, *inputs), exact[:, rows], atol=1e-12)


@by_case()
def test_operations_are_those_of_the_kept_pairs(case):
    kept = np.zeros((case.B, case.T, case.S))
    for b in range(case.B):
        for t in range(case.T):
            for s in range(case.S):
                inside = not case.is_causal or s <= t
                if "local_window_size" in case.options:
                    inside &= s >= t - 4
                if "query_segment_ids" in case.options:
                    ids = case.options["query_segment_ids"][0]
                    inside &= bool(ids[t] == ids[s])
                if "key_value_seq_lengths" in case.options:
                    inside &= bool(s < case.options["key_value_seq_lengths"][b])
                kept[b, t, s] = inside
    products = 7 if case.gradient else 2
    assert case.flops == 2 * products * case.N * case.H * kept.sum()


def test_ratios_are_medians_of_ratios_within_rounds():
    result = lambda *seconds: measure.Result(np.array(seconds), None, None, 0.0)  # noqa: E731
    results = {OURS: result(1.0, 2.0, 4.0), "jax.nn": result(3.0, 4.0, 40.0)}
    comparison = measure.Comparison(SMALL["full"], results, np.full(3, 1e9))
    assert comparison.ratio("jax.nn") == 3
    assert comparison.rate(OURS) == SMALL["full"].flops / 2
    assert comparison.of_best("jax.nn") == SMALL["full"].flops / 4 / 1e9


def test_subjects_that_cannot_do_a_case_are_left_out():
    assert SUBJECTS["jax.nn"](SMALL["packed"], random_inputs(SMALL["packed"])) is None
    assert OURS_INT8 not in compare(SMALL["gradient"], 1, [OURS, OURS_INT8]).results


def test_names_of_cases_are_their_own():
    assert all(name == case.name for name, case in CASES.items())
    for case in CASES.values():
        assert case.why


@pytest.fixture
def small_cases(monkeypatch):
    monkeypatch.setattr("flash_jax._cli.commands.CASES", SMALL)
    monkeypatch.setattr("flash_jax._cli.commands.LENGTHS", (5, 9))


@pytest.mark.usefixtures("small_cases")
def test_bench_prints_a_table_and_saves_json_and_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `plot`")
    saved, figure = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--rounds", "2", "--json", str(saved), "--plot", str(figure)]
    assert main(["bench", "causal", "decode", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "causal: small; 4 x 19 x 16, float32" in out
    assert "decode: small; 2 x 4/2 x 1 of 29 x 16, float32" in out
    assert "GFLOP/s" in out
    assert "GB/s" in out
    data = json.loads(saved.read_text())
    assert [case["name"] for case in data["cases"]] == ["causal", "decode"]
    assert len(data["cases"][0]["subjects"][OURS]["seconds"]) == 2
    assert data["environment"]["jax"]
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_cases")
def test_list_shows_the_cases(capsys):
    assert main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.count("small") == len(SMALL)


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
    monkeypatch.setattr(commands, "compare_alone", lambda *_: pytest.fail("measured"))
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_benchmark_is_not_imported_with_the_library():
    code = "import sys, flash_jax; print([m for m in sys.modules if 'bench' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_cells_of_a_table_match_its_header():
    comparison = compare(SMALL["full"], 1, [OURS])
    assert all(len(row) == len(report.HEADER) for row in report.rows(comparison))
