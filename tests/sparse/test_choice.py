"""Blocks chosen from the data: estimates against their definitions, and what they cost in error."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from options import random_inputs
from oracle import attention, max_error

from flash_jax import (
    BlockSparseMask,
    block_scores,
    choose_blocks,
    flash_attention,
    reference_attention,
    sparse_prefill,
)

B, N, K, H = 2, 4, 2, 6
T, S = 45, 52  # which the blocks do not divide
BLOCKS = (8, 4)


def qk(rng, T=T, S=S):
    q, k, _ = random_inputs(rng, B, T, S, N, K, H)
    return q, k


def softmax(s):
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def by_definition(q, k, method, is_causal, stride):
    """The importance of blocks of one query head q (T, H) and its keys k (S, H), in float64."""
    size = BLOCKS if method == "pooled" else (stride, stride)
    rows, columns = (-(-len(x) // n) for x, n in zip((q, k), size, strict=True))
    s = np.full((rows, columns), -np.inf)
    for i, j in np.ndindex(rows, columns):
        here, there = q[i * size[0] :][: size[0]], k[j * size[1] :][: size[1]]
        if is_causal and j * size[1] > i * size[0] + len(here) - 1:
            continue
        if method == "pooled":
            s[i, j] = here.mean(axis=0) @ there.mean(axis=0)
        else:
            products = np.zeros((stride, stride))
            products[: len(here), : len(there)] = here @ there.T
            s[i, j] = np.trace(products[::-1]) / stride
    p = softmax(s * H**-0.5)
    if method == "pooled":
        return p
    p = np.pad(p, [(0, -rows % (BLOCKS[0] // stride)), (0, -columns % (BLOCKS[1] // stride))])
    cells = p.reshape(
        -1, BLOCKS[0] // stride, p.shape[1] * stride // BLOCKS[1], BLOCKS[1] // stride
    )
    counts = np.minimum(BLOCKS[0] // stride, rows - np.arange(len(cells)) * BLOCKS[0] // stride)
    return cells.sum(axis=(1, 3)) / counts[:, None]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("method", ["pooled", "antidiagonal"])
def test_scores_of_blocks_are_their_definition(method, is_causal, rng):
    q, k = qk(rng)
    stride = 2 if method == "antidiagonal" else None
    found = block_scores(
        q, k, method=method, block_sizes=BLOCKS, is_causal=is_causal, stride=stride
    )
    assert found.shape == (B, K, 6, 13)
    for b, n in np.ndindex(B, K):
        heads = [
            by_definition(
                *(x.astype(np.float64) for x in (q[b, :, g], k[b, :, n])), method, is_causal, 2
            )
            for g in (2 * n, 2 * n + 1)
        ]
        assert max_error(found[b, n], np.mean(heads, axis=0)) < 1e-6
    np.testing.assert_allclose(np.sum(found, axis=-1), 1, rtol=1e-5)
    alone = block_scores(q[0], k[0], method=method, block_sizes=BLOCKS, is_causal=is_causal)
    assert alone.shape == (K, 6, 13)


def test_long_sequences_are_scored_in_several_steps(rng):
    q, k = qk(rng, T=301, S=26)
    found = block_scores(q[:1, :, :2], k[:1, :, :1], block_sizes=BLOCKS, stride=2)
    heads = [
        by_definition(q[0, :, g].astype(np.float64), k[0, :, 0].astype(np.float64), "", False, 2)
        for g in range(2)
    ]
    assert max_error(found[0, 0], np.mean(heads, axis=0)) < 1e-6


def always(is_causal, sinks=1, band=1):
    t, s = np.arange(6)[:, None] * BLOCKS[0], np.arange(13) * BLOCKS[1]
    last = np.minimum(t + BLOCKS[0], T) - 1
    reach = (band - 1) * BLOCKS[1]
    near = (s + BLOCKS[1] > t - reach) & (s <= last + (0 if is_causal else reach))
    may = (s <= last) | (not is_causal)
    return (near | (s < sinks * BLOCKS[1])) & may, np.broadcast_to(may, near.shape)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.55, 1.0])
def test_a_row_keeps_its_share_of_the_most_important_blocks(density, is_causal, rng):
    q, k = qk(rng)
    options = {"block_sizes": BLOCKS, "is_causal": is_causal, "method": "pooled"}
    table = np.asarray(choose_blocks(q, k, density=density, band=2, **options))
    importance = np.asarray(block_scores(q, k, **options))
    must, may = always(is_causal, band=2)
    assert not (table & ~may).any()
    assert table[..., must].all()
    share = np.ceil(density * may.sum(axis=-1) - 1e-9)
    np.testing.assert_array_equal(
        table.sum(axis=-1), np.broadcast_to(np.maximum(share, must.sum(axis=-1)), table.shape[:-1])
    )
    free, kept = may & ~must, np.where(table & ~must, importance, np.inf).min(axis=-1)
    assert (np.where(free & ~table, importance, -np.inf).max(axis=-1) <= kept).all()


def test_top_p_keeps_as_few_blocks_as_have_the_share(rng):
    q, k = qk(rng)
    options = {"block_sizes": BLOCKS, "method": "pooled", "sinks": 0, "band": 0}
    importance = np.asarray(block_scores(q, k, method="pooled", block_sizes=BLOCKS))
    table = np.asarray(choose_blocks(q, k, top_p=0.7, **options))
    mass = np.where(table, importance, 0).sum(axis=-1)
    least = np.where(table, importance, np.inf).min(axis=-1)
    assert (mass >= 0.7 - 1e-6).all()
    assert (mass - least < 0.7).all()
    assert choose_blocks(q, k, top_p=1, **options).all()


def test_with_all_blocks_it_is_attention(rng):
    qkv = random_inputs(rng, B, T, S, N, K, H)
    found = sparse_prefill(*qkv, density=1, block_sizes=BLOCKS)
    exact, _ = attention(*qkv, is_causal=True)
    assert max_error(found.output, exact) < 1e-6
    assert found.density == 1
    alone = sparse_prefill(*(x[0] for x in qkv), top_p=1.0, block_sizes=BLOCKS)
    assert max_error(alone.output, exact[0]) < 1e-6


def test_the_output_is_that_of_the_table_and_so_are_gradients(rng):
    q, k, v = random_inputs(rng, B, T, S, N, K, H)
    options = {"density": 0.4, "block_sizes": BLOCKS, "is_causal": True, "stride": 4}
    table = choose_blocks(q, k, **options)

    @functools.partial(jax.jit, static_argnums=3)
    def loss(q, k, v, chosen):
        if chosen:
            out = sparse_prefill(q, k, v, **options).output
        else:
            mask = BlockSparseMask(table, BLOCKS)
            out = flash_attention(q, k, v, mask=mask, is_causal=True)
        return jnp.sum(jnp.cos(out))

    found, expected = (jax.grad(loss, (0, 1, 2))(q, k, v, chosen) for chosen in (True, False))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    kept = np.asarray(sparse_prefill(q, k, v, **options).density)
    _, may = always(is_causal=True)
    np.testing.assert_allclose(kept, np.mean(np.asarray(table)[..., may]), rtol=1e-6)


@pytest.mark.parametrize("method", ["antidiagonal", "pooled"])
def test_where_attention_is_concentrated_a_quarter_is_nearly_all(method, rng):
    """Queries of a cluster read the keys of theirs, which lie in blocks: far less error than by
    blocks at random, and next to none."""
    T, H, size = 256, 16, 16
    centres = rng.standard_normal((4, H)) * 3
    of_block = centres[rng.permutation(T // size) % 4]
    of_block = np.repeat(of_block, size, axis=0)[None, :, None]
    q, k = ((of_block + rng.standard_normal((1, T, 2, H))).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((1, T, 2, H)).astype(np.float32)
    dense = np.asarray(reference_attention(q, k, v))

    def error(table):
        mask = BlockSparseMask(table, (size, size))
        out = flash_attention(q, k, v, mask=mask)
        return np.linalg.norm(out - dense) / np.linalg.norm(dense)

    options = {"density": 0.375, "block_sizes": (size, size)}
    chosen = choose_blocks(q, k, method=method, **options)
    noise = rng.standard_normal((2, 1, T, 2, H)).astype(np.float32)
    random = choose_blocks(*noise, method="pooled", **options)
    assert error(chosen) < 0.1
    assert error(chosen) < error(random) / 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "density or top_p must be given, and not both; they are None and None"),
        ({"density": 0.5, "top_p": 0.5}, ValueError, "density or top_p must be given"),
        ({"density": 0}, ValueError, r"density must be in \(0, 1\]; it is 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\]; it is 1.5"),
        ({"density": "all"}, TypeError, "density must be a number"),
        ({"density": 0.5, "method": "mean"}, ValueError, "method must be one of .*'mean'"),
        ({"density": 0.5, "stride": 3}, ValueError, r"stride must divide .*\(8, 4\); it is 3"),
        ({"density": 0.5, "stride": 2, "method": "pooled"}, ValueError, "stride must be None"),
        ({"density": 0.5, "sinks": -1}, ValueError, "sinks must be >= 0"),
        ({"density": 0.5, "band": 1.0}, TypeError, "band must be an integer"),
        ({"density": 0.5, "is_causal": 1}, TypeError, "is_causal must be a bool"),
        ({"density": 0.5, "scale": [1.0, 2.0]}, ValueError, "scale must be a scalar"),
        ({"density": 0.5, "block_sizes": (8, 0)}, ValueError, "block_sizes.kv must be > 0"),
    ],
)
def test_errors_name_the_argument(options, error, message, rng):
    q, k = qk(rng)
    with pytest.raises(error, match=message):
        sparse_prefill(q, k, k, **{"block_sizes": BLOCKS} | options)
