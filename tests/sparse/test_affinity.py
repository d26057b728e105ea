"""Affinities of blocks are their formula."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from refusals import refused

from flash_jax import block_affinity

B, T, N, K, H = 2, 23, 4, 2, 3
BLOCK = 5  # the last of 5 blocks has 3 positions


def inputs(rng):
    q, k = rng.standard_normal((B, T, N, H)), rng.standard_normal((B, T, K, H))
    return q.astype(np.float32), k.astype(np.float32)


def means(x):
    x = np.asarray(x, np.float64)
    return np.stack([x[:, i : i + BLOCK].mean(axis=1) for i in range(0, T, BLOCK)], axis=1)


def cosines(x):
    """(B, n, n) of (B, n, ...)."""
    x = (x - x.mean(axis=1, keepdims=True)).reshape(*x.shape[:2], -1)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ x.swapaxes(1, 2)


def scores(q, k, scale):
    """(B, K, G, n, n) of means."""
    q = q.reshape(B, -1, K, N // K, H)
    return scale * np.einsum("bikgh,bjkh->bkgij", q, k)


@pytest.mark.parametrize("per_head", [False, True])
def test_cosines_are_of_queries_and_of_keys_less_their_means(per_head, rng):
    q, k = inputs(rng)
    qm, km = means(q), means(k)
    if per_head:
        expected = [
            (cosines(qm[:, :, 2 * h : 2 * h + 2]) + cosines(km[:, :, h])) / 2 for h in range(K)
        ]
    else:
        expected = [(cosines(qm) + cosines(km)) / 2]
    expected = np.maximum(np.stack(expected, axis=1), 0)
    found = block_affinity(q, k, BLOCK, per_head=per_head)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    alone = block_affinity(q[0], k[0], BLOCK, per_head=per_head)
    np.testing.assert_allclose(alone, expected[0], atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "exp"])
def test_scores_of_means(kernel, is_causal, rng):
    q, k = inputs(rng)
    s = scores(means(q), means(k), 0.7)
    if is_causal:
        s = np.where(np.tri(5, dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(axis=-1 if kernel == "softmax" else (-2, -1), keepdims=True))
    if kernel == "softmax":
        p = p / p.sum(axis=-1, keepdims=True)
    options = {"kernel": kernel, "is_causal": is_causal, "scale": 0.7}
    found = block_affinity(q, k, BLOCK, per_head=True, **options)
    np.testing.assert_allclose(found, p.mean(axis=2), atol=1e-5)
    found = jax.jit(lambda q, k: block_affinity(q, k, BLOCK, **options))(q, k)
    np.testing.assert_allclose(found, p.mean(axis=(1, 2))[:, None], atol=1e-5)


def test_sixteen_bits_are_summed_in_thirty_two(rng):
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in inputs(rng))
    found = block_affinity(q, k, BLOCK)
    assert found.dtype == np.float32
    exact = block_affinity(q.astype(np.float32), k.astype(np.float32), BLOCK)
    np.testing.assert_allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": np.ones((1, 8, 2, 4), np.float32)}, ValueError, r"key must be \(B of query, T"),
        ({"key": np.ones((1, 7, 3, 4), np.float32)}, ValueError, "query heads must be a multiple"),
        ({"query": np.ones((7, 4), np.float32)}, ValueError, r"query must be \(B, T, N, H\)"),
        ({"query": np.ones((1, 7, 2, 4), int)}, TypeError, "query must be one of float32"),
        ({"block_size": 0}, ValueError, "block_size must be > 0; it is 0"),
        ({"kernel": "sum"}, ValueError, "kernel must be one of cosine, softmax, exp; it is 'sum'"),
        ({"scale": 1.0}, ValueError, "scale must not be given with kernel='cosine'"),
        ({"is_causal": True}, ValueError, "is_causal must not be given with kernel='cosine'"),
        ({"per_head": 1}, TypeError, "per_head must be a bool"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    x = np.ones((1, 7, 2, 4), np.float32)
    with refused(error, message):
        block_affinity(**({"query": x, "key": x, "block_size": 3} | change))
