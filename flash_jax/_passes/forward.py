"""The forward pass: for every tile of queries, one walk over the key tiles it may read.

Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.load import put_tile
from .._tiles.tile import QueryTile
from . import online_softmax as online
from .nonfinite import all_finite, finite, with_kept_nonfinite
from .operands import Dimensions, Operands, kept_weights
from .plan import Plan
from .products import Products
from .walk import over_key_tiles, over_query_tiles


class Results(NamedTuple):
    """Of the forward pass. From m and l the derivatives recompute p = exp(s - m) / l."""

    out: Array  # laid out as q, of its dtype
    lse: Array  # (B, N, T) natural log
    m: Array  # (B, N, T)
    l: Array  # (B, N, T)


def forward_shapes(operands: Operands, plan: Plan) -> Results:
    """Shapes and dtypes of the results."""
    dims = Dimensions.of(operands, plan)
    rows = jax.ShapeDtypeStruct((dims.instances, dims.N, dims.T), dims.acc)
    out = plan.layout.axes(dims.instances, dims.N, dims.T, dims.Hv)
    return Results(jax.ShapeDtypeStruct(tuple(out), plan.dtype), rows, rows, rows)  # pyright: ignore


def forward(operands: Operands, plan: Plan) -> Results:
    """Attention of every query head, with its softmax statistics."""
    dims = Dimensions.of(operands, plan)
    results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), forward_shapes(operands, plan))
    if dims.empty:
        if operands.sinks is None:
            return results._replace(lse=jnp.full_like(results.lse, -jnp.inf))
        sinks = operands.sinks.astype(dims.acc)[..., None]
        lse = jnp.broadcast_to(sinks, results.lse.shape)
        return results._replace(lse=lse, m=lse, l=jnp.ones_like(lse))

    def step(tile: QueryTile, results: Results) -> Results:
        state = tile.each(lambda tile, operands: forward_tile(operands, plan, tile), operands)
        out, lse = online.finish(state)
        n, t = tile.head * tile.groups, tile.q.start(tile.i)
        shape = (tile.together, tile.heads * tile.groups, tile.q.block)
        out = out.reshape(*shape, dims.Hv).astype(plan.dtype)
        rows = [x.reshape(shape) for x in (lse, state.m, state.l)]
        return Results(
            put_tile(plan.layout, results.out, out, tile.instance, n, t),
            *(
                lax.dynamic_update_slice(x, new, (tile.instance, n, t))
                for x, new in zip(results[1:], rows, strict=True)
            ),
        )

    return over_query_tiles(operands, plan, step, results, copies=1, several=True)


def forward_tile(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    """The state (heads, rows) of one tile of queries after all the keys its rows may read."""
    scores, sinks, acc = operands.scores, operands.sinks, Dimensions.of(operands, plan).acc
    products = plan.format.products(operands, plan, tile)
    careful = products.floats and not scores.always_full(tile.kv)

    def step(masked: bool) -> Callable[[Array, tuple], tuple]:
        absorb = _absorb(plan, tile, products, masked)

        def at(j: Array, carry: tuple) -> tuple:
            state, clean = carry
            s, v = products.scores(j), products.values(j)
            s = scores.logits(tile, j, scores.local(tile, j), s)
            if masked:
                s = jnp.where(scores.keep(tile, j), s, -jnp.inf)
            if masked and careful:
                clean, v = clean & all_finite(v, acc), finite(v)
            kept, weigh = kept_weights(operands, plan, tile, j), products.weigh
            if kept is not None:
                weigh = lambda p, v: products.weigh(p * kept, v)  # noqa: E731
            return absorb(state, s, v, weigh, products.exp), clean

        return at

    state = online.start(tile.rows, operands.v.shape[-1], acc)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (tile.heads, *x.shape)), state)
    state, clean = over_key_tiles(operands, tile, step, (state, jnp.array(True)))
    if careful:
        state = state._replace(o=with_kept_nonfinite(operands, plan, tile, clean, state.o))
    state = state._replace(o=products.finish(state.o))
    if sinks is not None:
        state = online.add_logit(state, tile.as_rows(tile.of_heads(sinks).astype(acc), 1)[..., 0])
    return state


def _absorb(
    plan: Plan, tile: QueryTile, products: Products, masked: bool
) -> Callable[..., online.State]:
    """How a key tile joins the state: the only one needs no rescaling of what was before."""
    if tile.kv.count != 1:
        return products.absorb
    shift = (lambda m: m) if plan.fused and not masked else online.finite_shift
    return lambda _, s, v, weigh, exp: online.of_block(s, v, weigh, exp, shift)
