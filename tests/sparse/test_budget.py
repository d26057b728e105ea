"""The best tiles, and as many as may be."""

import numpy as np

from flash_jax._sparse.budget import keep_best


def test_the_best_are_kept_and_of_equals_the_last(rng):
    rank = rng.integers(0, 4, (5, 6, 7)).astype(np.float32) * np.float32(0.3)
    rank[0] *= 1e-38  # subnormal ones, too
    budget = np.array([0, 1, 13, 30, 42], np.int32)
    kept = np.asarray(keep_best(rank, budget))
    for x, count, found in zip(rank, budget, kept, strict=True):
        x, found = x.ravel(), found.ravel()
        order = sorted(range(42), key=lambda i, x=x: (x[i], i), reverse=True)
        expected = [i for i in order[:count] if x[i] > 0]
        assert set(np.flatnonzero(found)) == set(expected)
