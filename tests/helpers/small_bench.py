"""Cases of the benchmark that are small, and subjects that are none."""

from flash_jax._cli.bench.cases import Case
from flash_jax._cli.bench.subjects import Entry

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


def fake(function, **fields):
    """A subject of helpers/bench_subjects.py."""
    return Entry("bench_subjects", function, lambda _: True, ("numpy",), **fields)
