"""The forward pass: for every query tile, one scan over the key tiles it may read.

Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from . import _online_softmax as online
from ._int8 import int8_products
from ._operands import (
    Dimensions,
    Operands,
    Static,
    finite,
    kept_weights,
    over_key_tiles,
    over_query_tiles,
)
from ._products import float_products
from ._query_tile import QueryTile
from ._tiles import put_tile


class Results(NamedTuple):
    """Of the forward pass. From m and l the derivatives recompute p = exp(s - m) / l."""

    out: Array  # laid out as q, of its dtype
    lse: Array  # (B, N, T) natural log
    m: Array  # (B, N, T)
    l: Array  # (B, N, T)


def forward_shapes(operands: Operands, static: Static) -> Results:
    """Shapes and dtypes of the results."""
    dims = Dimensions.of(operands, static)
    rows = jax.ShapeDtypeStruct((dims.rows, dims.N, dims.T), dims.acc)
    out = static.layout.axes(dims.rows, dims.N, dims.T, dims.Hv)
    return Results(jax.ShapeDtypeStruct(tuple(out), static.dtype), rows, rows, rows)  # pyright: ignore


def forward(operands: Operands, static: Static) -> Results:
    """Attention of every query head, with its softmax statistics."""
    dims = Dimensions.of(operands, static)
    results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), forward_shapes(operands, static))
    if dims.empty:
        if operands.sinks is None:
            return results._replace(lse=jnp.full_like(results.lse, -jnp.inf))
        sinks = operands.sinks.astype(dims.acc)[..., None]
        lse = jnp.broadcast_to(sinks, results.lse.shape)
        return results._replace(lse=lse, m=lse, l=jnp.ones_like(lse))
    # 0 * v is NaN where v is NaN or infinite: one fast sum tells whether any value is.
    all_finite = jnp.isfinite(jnp.sum(operands.v * 0, dtype=dims.acc))

    def step(tile: QueryTile, results: Results) -> Results:
        state = _attend(operands, static, tile, all_finite)
        out, lse = jax.vmap(online.finish)(state)
        n, t = tile.head * tile.groups, tile.q.start(tile.i)
        shape = (1, tile.heads * tile.groups, tile.q.block)
        out = out.reshape(*shape[1:], dims.Hv).astype(static.dtype)
        rows = [x.reshape(shape) for x in (lse, state.m, state.l)]
        return Results(
            put_tile(static.layout, results.out, out, tile.row, n, t),
            *(
                lax.dynamic_update_slice(x, new, (tile.row, n, t))
                for x, new in zip(results[1:], rows, strict=True)
            ),
        )

    return over_query_tiles(operands, static, step, results, copies=1)


def _attend(operands: Operands, static: Static, tile: QueryTile, all_finite: Array) -> online.State:
    """The state of one query tile's rows after all the keys they may read."""
    scores, sinks, acc = operands.scores, operands.sinks, Dimensions.of(operands, static).acc
    of_format = float_products if operands.quantization is None else int8_products
    products = of_format(operands, static, tile)

    def at(masked: bool) -> Callable[[Array, online.State], online.State]:
        def absorb(j: Array, state: online.State) -> online.State:
            s, v = products.scores(j), products.values(j)
            s = scores.logits(tile, j, scores.local(tile, j), s)
            if masked:
                s, v = jnp.where(scores.keep(tile, j), s, -jnp.inf), finite(v)

            def of_head(
                state: online.State, s: Array, v: Array, kept: Array | None
            ) -> online.State:
                def weigh(p: Array, v: Array) -> Array:
                    return products.weigh(p if kept is None else p * kept, v)

                return products.absorb(state, s, v, weigh)

            return jax.vmap(of_head)(state, s, v, kept_weights(operands, static, tile, j))

        return absorb

    def nonfinite(j: Array, o: Array) -> Array:
        """Adds the NaN and infinite values that are kept in a partial tile, and left out above."""
        v_tile, kept = products.values(j), scores.keep(tile, j).astype(acc)
        kinds = [jnp.isnan(v_tile), jnp.isposinf(v_tile), jnp.isneginf(v_tile)]
        for kind, value in zip(kinds, (jnp.nan, jnp.inf, -jnp.inf), strict=True):
            seen = jax.vmap(online.dot)(kept, kind.astype(acc))
            o += jnp.where(seen > 0, jnp.array(value, acc), 0)
        return o

    state = online.start(tile.rows, operands.v.shape[-1], acc)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (tile.heads, *x.shape)), state)
    state = over_key_tiles(operands, tile, at(False), at(True), state)
    # Quantized values are finite.
    if operands.quantization is None and not scores.always_full(tile.kv):
        show = lambda o: over_key_tiles(operands, tile, lambda _, o: o, nonfinite, o)  # noqa: E731
        state = state._replace(o=lax.cond(all_finite, lambda o: o, show, state.o))
    state = state._replace(o=products.finish(state.o))
    if sinks is not None:
        sink = tile.as_rows(tile.of_heads(sinks).astype(acc), 1)[..., 0]
        state = jax.vmap(online.add_logit)(state, sink)
    return state
