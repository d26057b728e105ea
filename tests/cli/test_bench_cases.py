"""The benchmark's cases, their exact results, and the subjects that can do them."""

import functools
import importlib

import jax
import numpy as np
import pytest
from gradient_oracle import attention_gradients
from oracle import attention
from small_bench import SMALL
from unoptimized import UNOPTIMIZED

from flash_jax._cli.bench import exact, processes, report
from flash_jax._cli.bench.cases import CASES, in_dtypes, over_devices, twin
from flash_jax._cli.bench.exact import exact_rows, random_inputs
from flash_jax._cli.bench.subjects import OURS, OURS_INT8, SUBJECTS, TORCH, versions


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
