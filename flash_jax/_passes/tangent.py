"""Forward mode: the tangent of attention, in one more scan over the same tiles.

With p = exp(s - lse), a tangent ds of the scores and dv of the values,
    dlse = sum_j p_j ds_j,    dout = sum_j p_j ds_j v_j - dlse out + sum_j p_j dv_j,
linear in the tangents: its transpose is the backward pass (``backward``).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.load import put_tile
from .._tiles.tile import QueryTile
from .._tiles.xla import dot
from .forward import Results
from .nonfinite import finite
from .operands import (
    Differentiable,
    Dimensions,
    Operands,
    kept_weights,
    kv_tile,
    q_tile,
    query_rows,
)
from .plan import Plan
from .probabilities import probabilities
from .walk import key_tiles, over_key_tiles, over_query_tiles


def tangent(
    operands: Operands, results: Results, tangents: Differentiable, plan: Plan
) -> tuple[Array, Array]:
    """Tangents of the output and of lse, from those of some operands."""
    operands, tangents = _of_one_shape(operands, tangents)
    dims = Dimensions.of(operands, plan)
    d_results = (jnp.zeros_like(results.out), jnp.zeros_like(results.lse))
    if dims.empty:
        return d_results

    def step(tile: QueryTile, d_results: tuple[Array, Array]) -> tuple[Array, Array]:
        d_out, d_lse = tangent_tile(operands, results, tangents, plan, tile)
        n, t = tile.head * tile.groups, tile.q.start(tile.i)
        shape = (1, tile.heads * tile.groups, tile.q.block)
        d_out = d_out.reshape(*shape, dims.Hv).astype(results.out.dtype)
        return (
            put_tile(plan.layout, d_results[0], d_out, tile.instance, n, t),
            lax.dynamic_update_slice(d_results[1], d_lse.reshape(shape), (tile.instance, n, t)),
        )

    return over_query_tiles(operands, plan, step, d_results, copies=3)


def tangent_tile(
    operands: Operands, results: Results, tangents: Differentiable, plan: Plan, tile: QueryTile
) -> tuple[Array, Array]:
    """Tangents (heads, rows, Hv) of the output and (heads, rows) of lse."""
    acc, scores = results.lse.dtype, operands.scores
    out = q_tile(plan, tile, results.out, acc)
    m, l = (query_rows(tile, x) for x in (results.m, results.l))

    def logits(operands: Operands, j: Array) -> Array:
        q, k = q_tile(plan, tile, operands.q, acc), kv_tile(plan, tile, operands.k, j, acc)
        scores = operands.scores
        s = scores.products(scores.scaled(tile, q), k)
        return scores.own_logits(tile, j, s)

    def step(masked: bool) -> Callable[[Array, tuple[Array, Array]], tuple[Array, Array]]:
        clean = finite if masked else lambda x: x

        def at(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_out, d_lse = carry
            varied = _where(tangents, operands)
            s, ds = jax.jvp(lambda x: logits(x.into(operands), j), (varied,), (tangents,))
            if masked:
                kept = scores.kept_logits(scores.keep(tile, j), s)
                s, ds = jnp.where(kept, s, -jnp.inf), jnp.where(kept, ds, 0)
            p = probabilities(s, m, l)
            dp = p * ds
            d_lse += jnp.sum(dp, axis=-1)
            weights = kept_weights(operands, plan, tile, j)
            if weights is not None:
                p, dp = p * weights, dp * weights
            d_out += dot(dp, clean(kv_tile(plan, tile, operands.v, j, acc)))
            if tangents.v is not None:
                d_out += dot(p, clean(kv_tile(plan, tile, tangents.v, j, acc)))
            return d_out, d_lse

        return at

    carry = (jnp.zeros_like(out), jnp.zeros_like(m))
    d_out, d_lse = over_key_tiles(operands, tile, key_tiles(operands, tile), step, carry)
    if operands.sinks is not None and tangents.sinks is not None:
        sink, d_sink = (
            tile.as_rows(tile.of_heads(x).astype(acc), 1) for x in (operands.sinks, tangents.sinks)
        )
        d_lse += (probabilities(sink, m, l) * d_sink)[..., 0]
    return d_out - d_lse[..., None] * out, d_lse


def _where(tangents: Differentiable, operands: Operands) -> Differentiable:
    """The operands that have a tangent."""
    all_, moving = Differentiable.of(operands), tangents.by_name()
    return all_.named({name: x for name, x in all_.by_name().items() if name in moving})


def _of_one_shape(operands: Operands, tangents: Differentiable) -> tuple[Operands, Differentiable]:
    """Gives an operand and its tangent equally many entries.

    Under ``vmap`` one of the two may serve all calls where the other has an entry for each.
    """
    all_, moving = Differentiable.of(operands), tangents.by_name()
    xs = all_.by_name()
    spread = {name: jnp.broadcast_arrays(xs[name], t) for name, t in moving.items()}
    xs |= {name: x for name, (x, _) in spread.items()}
    moved = {name: t for name, (_, t) in spread.items()}
    return all_.named(xs).into(operands), all_.named(moved)
