"""The forward pass: for every query tile, one scan over the key tiles it may read.

Full key tiles are absorbed into the online-softmax state first, then partial ones with the mask
applied; skipped ones are never touched (``_schedule``).

Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from . import _online_softmax as online
from ._block_sizes import heads_per_step
from ._machine import machine
from ._masks import Mask
from ._schedule import Tiling, keep_tile, never_partial, status, visits
from ._tiles import Layout, fold_batch, put_tile, take_tile


class Operands(NamedTuple):
    """What may be traced. Every array's first axis is the batch, of size B or 1."""

    q: Array  # (B, N, T, H) or (B, T, N, H), as the layout says
    k: Array  # (B, K, S, H) or (B, S, K, H)
    v: Array  # as k; its head size may differ
    mask: Mask | None


class Static(NamedTuple):
    """What is known before any value is, and compiled in."""

    tiling: Tiling
    scale: float
    layout: Layout


def forward(operands: Operands, static: Static) -> tuple[Array, Array]:
    """Attention of every query head: output, laid out as q and of its dtype, and lse (B, N, T)."""
    return fold_batch(functools.partial(_forward, static=static), operands)


def _forward(operands: Operands, static: Static) -> tuple[Array, Array]:
    q, k, v, mask = operands
    tiling, layout = static.tiling, static.layout
    B = max(x.shape[0] for x in jax.tree.leaves(operands))
    _, N, T, _ = layout.sizes(q)
    K = layout.sizes(k)[1]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    results = (  # of an empty problem, too
        jnp.zeros(layout.axes(B, N, T, v.shape[-1]), q.dtype),
        jnp.full((B, N, T), -jnp.inf, acc),
    )
    if 0 in (*q.shape, *v.shape):
        return results
    G = N // K
    heads = heads_per_step(machine(), K, G * tiling.q.block, tiling.kv.block, mask is not None)
    # 0 * v is NaN where v is NaN or infinite: one fast sum tells whether any value is.
    finite = jnp.isfinite(jnp.sum(v * 0, dtype=acc))

    def query_tile(step: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        b, step = jnp.divmod(step, np.int32(K // heads * tiling.q.count))
        group, i = jnp.divmod(step, np.int32(tiling.q.count))
        o, lse = _attend(operands, static, finite, b, group * heads, heads, i)
        n, t = group * heads * G, tiling.q.start(i)
        return (
            put_tile(layout, results[0], o.astype(q.dtype), b, n, t),
            lax.dynamic_update_slice(results[1], lse[None], (b, n, t)),
        )

    steps = np.int32(B * (K // heads) * tiling.q.count)
    return lax.fori_loop(np.int32(0), steps, query_tile, results)


def _attend(
    operands: Operands, static: Static, finite: Array, b: Array, head: Array, heads: int, i: Array
) -> tuple[Array, Array]:
    """Output (N, block_q, Hv) and lse (N, block_q) of query tile i.

    N query heads that read key/value heads head..head+heads-1 share the loops.
    """
    q, k, v, mask = operands
    tiling, layout = static.tiling, static.layout
    G = layout.sizes(q)[1] // layout.sizes(k)[1]
    rows = G * tiling.q.block
    acc = jnp.promote_types(q.dtype, jnp.float32)
    n = (head * G + lax.iota(np.int32, heads * G)).reshape(heads, G, 1, 1)

    q_tile = take_tile(layout, q, b, head * G, heads * G, tiling.q.start(i), tiling.q.block)
    # Scaled before the product: after it, XLA may fuse s * scale - m into one rounding, which is
    # not 0 at the maximum.
    q_tile = q_tile.reshape(heads, rows, -1).astype(acc) * np.array(static.scale, acc)

    def kv_tile(x: Array, j: Array) -> Array:
        start = tiling.kv.start(j)
        return take_tile(layout, x, b, head, heads, start, tiling.kv.block).astype(acc)

    def full_tile(j: Array, state: online.State) -> online.State:
        s = jax.vmap(lambda q, k: online.dot(q, k.T))(q_tile, kv_tile(k, j))
        return jax.vmap(online.absorb)(state, s, kv_tile(v, j))

    def keep(j: Array) -> Array:
        kept = keep_tile(mask, tiling, b, n, i, j)
        kept = jnp.broadcast_to(kept, (heads, G, tiling.q.block, tiling.kv.block))
        return kept.reshape(heads, rows, tiling.kv.block)

    def partial_tile(j: Array, state: online.State) -> online.State:
        s = jax.vmap(lambda q, k: online.dot(q, k.T))(q_tile, kv_tile(k, j))
        v_tile = kv_tile(v, j)
        # 0 * NaN is NaN: a masked value must be finite to vanish.
        v_tile = jnp.where(jnp.isfinite(v_tile), v_tile, 0)
        return jax.vmap(online.absorb)(state, jnp.where(keep(j), s, -jnp.inf), v_tile)

    def show_nonfinite(j: Array, o: Array) -> Array:
        """Adds the NaN and infinite values that are kept in a partial tile, and left out above."""
        v_tile = kv_tile(v, j)
        kinds = [jnp.isnan(v_tile), jnp.isposinf(v_tile), jnp.isneginf(v_tile)]
        for kind, value in zip(kinds, (jnp.nan, jnp.inf, -jnp.inf), strict=True):
            seen = jax.vmap(online.dot)(keep(j).astype(acc), kind.astype(acc))
            o += jnp.where(seen > 0, value, 0)
        return o

    state = online.start(rows, v.shape[-1], acc)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (heads, *x.shape)), state)
    if never_partial(mask, tiling):
        state = lax.fori_loop(np.int32(0), np.int32(tiling.kv.count), full_tile, state)
    else:
        order, full, end = visits(status(mask, tiling, b, n, i))
        at = lambda step: lambda x, carry: step(order[x], carry)  # noqa: E731
        state = lax.fori_loop(np.int32(0), full, at(full_tile), state)
        state = lax.fori_loop(full, end, at(partial_tile), state)
        o = lax.cond(
            finite, lambda o: o, lambda o: lax.fori_loop(full, end, at(show_nonfinite), o), state.o
        )
        state = state._replace(o=o)
    o, lse = jax.vmap(online.finish)(state)
    return o.reshape(heads * G, tiling.q.block, -1), lse.reshape(heads * G, tiling.q.block)
