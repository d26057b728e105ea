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
from ._dropout import drop
from ._machine import machine
from ._query_tile import Axis, QueryTile
from ._schedule import visits
from ._scores import Scores
from ._shapes import BlockSizes
from ._tiles import Layout, fold_batch, put_tile, take_tile


class Operands(NamedTuple):
    """What may be traced. Every array's first axis is the batch, of size B or 1."""

    q: Array  # (B, N, T, H) or (B, T, N, H), as the layout says
    k: Array  # (B, K, S, H) or (B, S, K, H)
    v: Array  # as k; its head size may differ
    scores: Scores
    sinks: Array | None = None  # (B, N): one more logit in the denominator
    dropout_key: Array | None = None  # (B, 2) uint32


class Static(NamedTuple):
    """What is known before any value is, and compiled in."""

    blocks: BlockSizes
    layout: Layout
    dropout_rate: float = 0.0


def forward(operands: Operands, static: Static) -> tuple[Array, Array]:
    """Attention: output, laid out as q and of its dtype, and natural-log lse (B, N, T)."""
    B = operands.q.shape[0]
    return fold_batch(functools.partial(_forward, static=static, batch=B), operands)


def _forward(operands: Operands, static: Static, batch: int) -> tuple[Array, Array]:
    """Of ``batch`` elements, or of a multiple where vmapped calls are folded in."""
    q, k, v, scores, *_ = operands
    layout = static.layout
    rows = max(x.shape[0] for x in jax.tree.leaves(operands))
    (_, N, T, _), (_, K, S, _) = layout.sizes(q), layout.sizes(k)
    acc = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.zeros(layout.axes(rows, N, T, v.shape[-1]), q.dtype)
    lse = jnp.full((rows, N, T), -jnp.inf, acc)
    if operands.sinks is not None:
        lse = jnp.broadcast_to(operands.sinks.astype(acc)[..., None], lse.shape)
    if 0 in (*out.shape, S):
        return out, lse

    q_axis, kv_axis = Axis.of(T, static.blocks.q), Axis.of(S, static.blocks.kv)
    masked = not scores.always_full(kv_axis)
    heads = heads_per_step(machine(), K, N // K * q_axis.block, kv_axis.block, masked)
    # 0 * v is NaN where v is NaN or infinite: one fast sum tells whether any value is.
    finite = jnp.isfinite(jnp.sum(v * 0, dtype=acc))

    def query_tile(step: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        row, step = jnp.divmod(step, np.int32(K // heads * q_axis.count))
        group, i = jnp.divmod(step, np.int32(q_axis.count))
        tile = QueryTile(
            q_axis, kv_axis, row, row % np.int32(batch), group * heads, heads, N // K, i
        )
        o, lse = _attend(operands, static, finite, tile)
        n, t = tile.head * tile.groups, q_axis.start(i)
        return (
            put_tile(layout, results[0], o.astype(q.dtype), row, n, t),
            lax.dynamic_update_slice(results[1], lse[None], (row, n, t)),
        )

    steps = np.int32(rows * (K // heads) * q_axis.count)
    return lax.fori_loop(np.int32(0), steps, query_tile, (out, lse))


def _attend(
    operands: Operands, static: Static, finite: Array, tile: QueryTile
) -> tuple[Array, Array]:
    """Output (heads * groups, block_q, Hv) and lse (heads * groups, block_q) of one query tile."""
    q, k, v, scores, sinks, dropout_key = operands
    acc = jnp.promote_types(q.dtype, jnp.float32)
    q_heads, q_start = tile.heads * tile.groups, tile.q.start(tile.i)
    q_tile = take_tile(
        static.layout, q, tile.row, tile.head * tile.groups, q_heads, q_start, tile.q.block
    )
    q_tile = scores.scaled(tile, q_tile.reshape(tile.heads, tile.rows, -1).astype(acc))

    def kv_tile(x: Array, j: Array) -> Array:
        start, size = tile.kv.start(j), tile.kv.block
        return take_tile(static.layout, x, tile.row, tile.head, tile.heads, start, size).astype(acc)

    def absorb(j: Array, state: online.State, s: Array, v: Array) -> online.State:
        if dropout_key is None:
            return jax.vmap(online.absorb)(state, s, v)
        kept = drop(dropout_key, static.dropout_rate, tile, j, acc)
        weigh = lambda kept: lambda p, v: online.dot(p * kept, v)  # noqa: E731
        step = lambda state, s, v, kept: online.absorb(state, s, v, weigh(kept))  # noqa: E731
        return jax.vmap(step)(state, s, v, kept)

    def full_tile(j: Array, state: online.State) -> online.State:
        return absorb(j, state, scores.logits(tile, j, q_tile, kv_tile(k, j)), kv_tile(v, j))

    def partial_tile(j: Array, state: online.State) -> online.State:
        s = scores.logits(tile, j, q_tile, kv_tile(k, j))
        v_tile = kv_tile(v, j)
        # 0 * NaN is NaN: a masked value must be finite to vanish.
        v_tile = jnp.where(jnp.isfinite(v_tile), v_tile, 0)
        return absorb(j, state, jnp.where(scores.keep(tile, j), s, -jnp.inf), v_tile)

    def show_nonfinite(j: Array, o: Array) -> Array:
        """Adds the NaN and infinite values that are kept in a partial tile, and left out above."""
        v_tile, kept = kv_tile(v, j), scores.keep(tile, j).astype(acc)
        kinds = [jnp.isnan(v_tile), jnp.isposinf(v_tile), jnp.isneginf(v_tile)]
        for kind, value in zip(kinds, (jnp.nan, jnp.inf, -jnp.inf), strict=True):
            seen = jax.vmap(online.dot)(kept, kind.astype(acc))
            o += jnp.where(seen > 0, jnp.array(value, acc), 0)
        return o

    state = online.start(tile.rows, v.shape[-1], acc)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (tile.heads, *x.shape)), state)
    if scores.always_full(tile.kv):
        state = lax.fori_loop(np.int32(0), np.int32(tile.kv.count), full_tile, state)
    else:
        order, full, end = visits(scores.schedule_row(tile))
        at = lambda step: lambda x, carry: step(order[x], carry)  # noqa: E731
        if scores.bias is None:
            state = lax.fori_loop(np.int32(0), full, at(full_tile), state)
        state = lax.fori_loop(full, end, at(partial_tile), state)
        o = lax.cond(
            finite, lambda o: o, lambda o: lax.fori_loop(full, end, at(show_nonfinite), o), state.o
        )
        state = state._replace(o=o)
    if sinks is not None:
        sink = jnp.broadcast_to(tile.of_heads(sinks), (tile.heads, tile.groups, tile.q.block, 1))
        state = jax.vmap(online.add_logit)(state, sink.reshape(state.m.shape).astype(acc))
    o, lse = jax.vmap(online.finish)(state)
    return o.reshape(q_heads, tile.q.block, -1), lse.reshape(q_heads, tile.q.block)
