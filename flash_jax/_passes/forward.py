"""The forward pass: for every query tile, one scan over the key tiles it may read.

Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from .._formats.few_rows import streaming_products
from .._formats.floats import float_products
from .._formats.int8 import int8_products
from .._machine.tile_rule import FUSED_KEYS, few_rows
from .._tiles.layout import Layout
from .._tiles.load import put_tile
from .._tiles.tile import QueryTile
from .._tiles.xla import in_every_element
from . import online_softmax as online
from .operands import (
    Dimensions,
    Operands,
    Static,
    finite,
    kept_weights,
    kv_tile,
    over_key_tiles,
    over_query_tiles,
)


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

    def step(tile: QueryTile, results: Results) -> Results:
        state = tile.each(lambda tile, operands: _attend(operands, static, tile), operands)
        out, lse = online.finish(state)
        n, t = tile.head * tile.groups, tile.q.start(tile.i)
        shape = (tile.elements, tile.heads * tile.groups, tile.q.block)
        out = out.reshape(*shape, dims.Hv).astype(static.dtype)
        rows = [x.reshape(shape) for x in (lse, state.m, state.l)]
        return Results(
            put_tile(static.layout, results.out, out, tile.row, n, t),
            *(
                lax.dynamic_update_slice(x, new, (tile.row, n, t))
                for x, new in zip(results[1:], rows, strict=True)
            ),
        )

    return over_query_tiles(operands, static, step, results, copies=1, several=True)


def _attend(operands: Operands, static: Static, tile: QueryTile) -> online.State:
    """The state (heads, rows) of one query tile after all the keys its rows may read."""
    scores, sinks, acc = operands.scores, operands.sinks, Dimensions.of(operands, static).acc
    of_format = float_products if operands.quantization is None else int8_products
    if static.kv_layout is Layout.HEADS_LAST and few_rows(tile.rows, tile.heads):
        of_format = streaming_products
    products = of_format(operands, static, tile)

    # Of a kept value that is NaN or infinite the output tells; a masked one must not be multiplied.
    clean = operands.quantization is None and not scores.always_full(tile.kv)

    def at(masked: bool) -> Callable[[Array, tuple], tuple]:
        def absorb(j: Array, carry: tuple) -> tuple:
            state, all_finite = carry
            s, v = products.scores(j), products.values(j)
            s = scores.logits(tile, j, scores.local(tile, j), s)
            if masked:
                s = jnp.where(scores.keep(tile, j), s, -jnp.inf)
            if masked and clean:
                # 0 * v is NaN where v is not finite: one fast sum tells.
                all_finite &= jnp.isfinite(jnp.sum(v * 0, dtype=acc))
                v = finite(v)
            kept = kept_weights(operands, static, tile, j)
            weigh = products.weigh
            if kept is not None:
                weigh = lambda p, v: products.weigh(p * kept, v)  # noqa: E731
            if tile.kv.count == 1:
                fused = not masked and tile.kv.block <= FUSED_KEYS
                shift = (lambda m: m) if fused else online.finite_shift
                return online.of_block(s, v, weigh, products.exp, shift), all_finite
            return products.absorb(state, s, v, weigh, products.exp), all_finite

        return absorb

    def nonfinite(j: Array, o: Array) -> Array:
        """Adds the NaN and infinite values that are kept in a partial tile, and left out above."""
        v = kv_tile(static, tile, operands.v, j, acc)
        kept = scores.keep(tile, j).astype(acc)
        kinds = [jnp.isnan(v), jnp.isposinf(v), jnp.isneginf(v)]
        for kind, value in zip(kinds, (jnp.nan, jnp.inf, -jnp.inf), strict=True):
            seen = online.dot(kept, kind.astype(acc))
            o += jnp.where(seen > 0, jnp.array(value, acc), 0)
        return o

    state = online.start(tile.rows, operands.v.shape[-1], acc)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (tile.heads, *x.shape)), state)
    state, all_finite = over_key_tiles(
        operands, tile, at(False), at(True), (state, jnp.array(True))
    )
    if clean:
        show = lambda o: over_key_tiles(operands, tile, lambda _, o: o, nonfinite, o)  # noqa: E731
        all_finite = in_every_element(all_finite)
        state = state._replace(o=lax.cond(all_finite, lambda o: o, show, state.o))
    state = state._replace(o=products.finish(state.o))
    if sinks is not None:
        sink = tile.as_rows(tile.of_heads(sinks).astype(acc), 1)[..., 0]
        state = online.add_logit(state, sink)
    return state
