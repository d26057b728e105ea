"""How much of a row's attention a block of keys has, estimated from few scores.

    pooled         one score per block: that of the mean query and the mean key
    antidiagonal   the scores of every stride-th pair of a block, which lie on antidiagonals: every
                   query and every key of the block is in some of them

Of the sampled scores of a row of blocks a softmax is taken, and a block has the sum of its
probabilities. Query heads that share a key/value head are averaged: they read the same blocks.

Xu et al., XAttention, 2025, section 2.1, https://arxiv.org/abs/2503.16428
Jiang et al., MInference 1.0, 2024, section 3.2 (means of blocks), https://arxiv.org/abs/2407.02490
"""

from __future__ import annotations

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.axis import BlockSizes

_CELLS = 128  # rows of cells at a time: fewer would take longer to read the keys than to multiply


def pooled(query: Array, key: Array, blocks: BlockSizes, scale: Array, is_causal: bool) -> Array:
    """The importance of blocks, (B, K, T / block_q, S / block_kv) float32; rows sum to 1.

    Time and memory are those of a table of scores per query head, and of reading q and k once.

    Args:
        query: (B, T, N, H).
        key: (B, S, K, H).
        scale: of the products, a scalar.
        is_causal: whether query t reads keys 0..t only.
    """
    (_, T, N, _), (_, S, K, _) = query.shape, key.shape
    q, k = _means(query, blocks.q), _means(key, blocks.kv)
    s = _products(q * scale, k)
    s = jnp.where(allowed(T, S, blocks, is_causal)[None, None], s, -jnp.inf)
    return _of_key_heads(_softmax(s), N // K)


def antidiagonal(
    query: Array, key: Array, blocks: BlockSizes, scale: Array, is_causal: bool, stride: int
) -> Array:
    """As ``pooled``, from the sums of scores on antidiagonals of cells of stride x stride.

    A cell's sum is one product of vectors: of its queries in reverse order, and its keys, each
    laid end to end. So the scores take T S / stride products of heads, and T S / stride^2 numbers,
    of some rows of blocks at a time.

    Args:
        stride: divides both block sizes.
    """
    (B, T, N, H), (_, S, K, _) = query.shape, key.shape
    rows, columns = (-(-n // block) for n, block in zip((T, S), blocks, strict=True))
    cells, height = BlockSizes(stride, stride), blocks.q // stride
    together = min(rows, -(-_CELLS // height))  # rows of blocks
    steps = -(-rows // together)
    q = _in_blocks(query.astype(np.float32) * scale, together * blocks.q)
    q = jnp.flip(q.reshape(B, steps, together * height, stride, N, H), axis=3)
    q = jnp.moveaxis(q, (1, 4), (0, 2)).reshape(steps, B, N, -1, stride * H)
    k = _in_blocks(key.astype(np.float32), blocks.kv).reshape(B, -1, stride, K, H)
    k = jnp.moveaxis(k, 3, 1).reshape(B, K, -1, stride * H)
    real = _met(T, S, cells, steps * together * height, k.shape[2], is_causal)
    real = real.reshape(steps, together * height, -1)

    def of_rows(x: tuple[Array, Array]) -> Array:
        q, real = x
        s = _products(q, k) / np.float32(stride)
        p = _softmax(jnp.where(real[None, None], s, -jnp.inf))
        p = jnp.sum(p.reshape(B, N, together, height, columns, -1), axis=(3, 5))
        # Of the queries that exist: padded ones read nothing.
        count = jnp.sum(jnp.any(real, axis=-1).reshape(together, height), axis=-1)
        return p / jnp.maximum(1, count).astype(np.float32).reshape(1, 1, -1, 1)

    found = jnp.moveaxis(lax.map(of_rows, (q, real)), 0, 2).reshape(B, N, -1, columns)
    return _of_key_heads(found[:, :, :rows], N // K)


def allowed(T: int, S: int, blocks: BlockSizes, is_causal: bool) -> np.ndarray:
    """The blocks in which some query may read some key, bool (T / block_q, S / block_kv)."""
    rows, columns = (-(-n // block) for n, block in zip((T, S), blocks, strict=True))
    return _met(T, S, blocks, rows, columns, is_causal)


def _met(T: int, S: int, cells: BlockSizes, rows: int, columns: int, is_causal: bool) -> np.ndarray:
    """As ``allowed``, of this many rows and columns, some of which may be padding."""
    first_t, first_s = np.arange(rows) * cells.q, np.arange(columns) * cells.kv
    last_t = np.minimum(first_t + cells.q, T) - 1
    met = (first_t < T)[:, None] & (first_s < S)
    return met & (first_s <= last_t[:, None]) if is_causal else met


def _in_blocks(x: Array, block: int) -> Array:
    """x (B, T, N, H) with zeros up to whole blocks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)])


def _means(x: Array, block: int) -> Array:
    """(B, N, T / block, H): the mean of every block of x (B, T, N, H)."""
    B, T, N, H = x.shape
    sums = jnp.sum(_in_blocks(x.astype(np.float32), block).reshape(B, -1, block, N, H), axis=2)
    counts = np.minimum(block, T - np.arange(sums.shape[1]) * block).astype(np.float32)
    return jnp.swapaxes(sums / counts[None, :, None, None], 1, 2)


def _products(q: Array, k: Array) -> Array:
    """q (B, N, n, H) times k (B, K, m, H): (B, N, n, m)."""
    (B, N, n, H), K = q.shape, k.shape[1]
    s = jnp.einsum("bkgnh,bkmh->bkgnm", q.reshape(B, K, N // K, n, H), k)
    return s.reshape(B, N, n, -1)


def _softmax(s: Array) -> Array:
    """The softmax of rows; 0 in those that are all -inf, or not finite."""
    m = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.exp(s - jnp.where(jnp.isneginf(m), 0, m))
    return p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), np.float32(1e-30))


def _of_key_heads(x: Array, groups: int) -> Array:
    """(B, K, n, m): the mean of x (B, N, n, m) over the query heads of each key/value head."""
    B, N, n, m = x.shape
    return jnp.mean(x.reshape(B, N // groups, groups, n, m), axis=2)
