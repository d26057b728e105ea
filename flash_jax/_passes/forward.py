"""The forward pass: for every tile of queries, one walk over the key tiles it may read.

Where XLA makes one kernel of a tile, all tiles go that way first (``kernel``). The exact loop then
gives the rows that are not known to be right, and runs no step if all are.

Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.axis import Axis
from .._tiles.load import put_tile, take_tiles
from .._tiles.tile import QueryTile
from .._tiles.xla import in_every_element
from . import online_softmax as online
from .few_rows import few_tile, over_few
from .kernel import kernel_tile, whole_rows, with_ones
from .nonfinite import all_finite, finite, with_kept_nonfinite
from .operands import Dimensions, Operands, kept_weights, with_sinks
from .plan import Plan
from .products import Products
from .walk import key_tiles, over_key_tiles, over_query_tiles


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
    if plan.few is not None:

        def step(tile: QueryTile, results: Results) -> Results:
            return _with_tile(plan, tile, results, few_tile(operands, plan, tile))

        return over_few(operands, plan, step, results)
    if not _kernels(operands, plan):
        return _exact(operands, plan, results)
    return _exact(operands, plan, *_by_kernels(operands, plan, results))


def _exact(operands: Operands, plan: Plan, results: Results, right: Array | None = None) -> Results:
    """The results of the exact loop, but for rows that are right already, (B, N, T)."""
    done = None if right is None else in_every_element(jnp.all(right))

    def step(tile: QueryTile, results: Results) -> Results:
        state = tile.each(lambda tile, operands: forward_tile(operands, plan, tile), operands)
        return _with_tile(plan, tile, results, state, right)

    return over_query_tiles(operands, plan, step, results, copies=1, several=True, unless=done)


def output(operands: Operands, plan: Plan) -> Array:
    """The output alone."""
    if not _kernels(operands, plan) or not _in_whole_rows(operands, plan):
        return forward(operands, plan).out

    def step(tile: QueryTile, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        rows, (out, right) = tile.together * tile.heads * tile.rows, carry
        new = tile.each(lambda tile, operands: whole_rows(operands, kernels, tile, rows), operands)
        if right is not None:
            right = _with_rows(tile, right, jnp.isfinite(jnp.sum(new * 0, axis=-1)))
        return _with_output(plan, tile, out, new), right

    results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), forward_shapes(operands, plan))
    kernels, function = _plan_of_kernels(operands, plan), operands.scores.function
    # A function may give -inf: then a row may be empty, and 0 times a NaN behind it is NaN.
    carry = results.out, None if function is None else jnp.zeros(results.lse.shape, bool)
    out, right = over_query_tiles(operands, kernels, step, carry, copies=1, several=True)
    return out if right is None else _exact(operands, plan, results._replace(out=out), right).out


def _kernels(operands: Operands, plan: Plan) -> bool:
    """Whether XLA makes one kernel of a tile."""
    return plan.kernel is not None and plan.few is None and operands.scores.one_kernel


def _plan_of_kernels(operands: Operands, plan: Plan) -> Plan:
    return plan.of_kernels if operands.scores.function is None else plan.of_stored_kernels


def _in_whole_rows(operands: Operands, plan: Plan) -> bool:
    """Whether every row reads all keys, in one tile."""
    dims = Dimensions.of(operands, plan)
    kv = Axis.of(dims.S, plan.of_kernels.blocks.kv)
    sole = kv.count == 1 and operands.scores.always_full(kv, True)
    return sole and operands.sinks is None and not dims.empty


def _by_kernels(operands: Operands, plan: Plan, results: Results) -> tuple[Results, Array]:
    """The results by one kernel per tile, and which rows of them are right, (B, N, T)."""
    width, plan = operands.v.shape[-1], _plan_of_kernels(operands, plan)
    operands = with_ones(operands, plan)

    def step(tile: QueryTile, carry: tuple[Results, Array]) -> tuple[Results, Array]:
        of_one = lambda tile, operands: kernel_tile(operands, plan, tile, width)  # noqa: E731
        state, right = tile.each(of_one, operands)
        return _with_tile(plan, tile, carry[0], state), _with_rows(tile, carry[1], right)

    carry = results, jnp.zeros(results.lse.shape, bool)
    return over_query_tiles(operands, plan, step, carry, copies=1, several=True)


def _with_tile(
    plan: Plan, tile: QueryTile, results: Results, state: online.State, keep: Array | None = None
) -> Results:
    """The results with those of one tile of queries, but for rows to keep, (B, N, T).

    So a row depends on what it reads alone, and not on whether others are right.
    """
    out, lse = online.finish(state)
    rows = zip(results[1:], (lse, state.m, state.l), strict=True)
    return Results(
        _with_output(plan, tile, results.out, out, keep),
        *(_with_rows(tile, x, new, keep) for x, new in rows),
    )


def _with_rows(tile: QueryTile, x: Array, new: Array, keep: Array | None = None) -> Array:
    shape = (tile.together, tile.heads * tile.groups, tile.q.block)
    start = (tile.instance, tile.head * tile.groups, tile.q.start(tile.i))
    new = new.reshape(shape)
    if keep is not None:
        old, kept = (lax.dynamic_slice(a, start, shape) for a in (x, keep))
        new = jnp.where(kept, old, new)
    return lax.dynamic_update_slice(x, new, start)


def _with_output(
    plan: Plan, tile: QueryTile, out: Array, new: Array, keep: Array | None = None
) -> Array:
    shape = (tile.together, tile.heads * tile.groups, tile.q.block, out.shape[-1])
    start = (tile.instance, tile.head * tile.groups, tile.q.start(tile.i))
    new = new.reshape(shape).astype(plan.dtype)
    if keep is not None:
        old = take_tiles(plan.layout, out, *start, shape)
        kept = lax.dynamic_slice(keep, start, shape[:3])
        new = jnp.where(kept[..., None], old, new)
    return put_tile(plan.layout, out, new, *start)


def forward_tile(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    """The state (heads, rows) of one tile of queries after all the keys its rows may read."""
    scores, acc = operands.scores, Dimensions.of(operands, plan).acc
    products = plan.format.products(operands, plan, tile)
    careful = products.floats and not scores.always_full(tile.kv)

    def step(masked: bool) -> Callable[[Array, tuple], tuple]:
        absorb = _absorb(plan, tile, products, masked)

        def at(j: Array, carry: tuple) -> tuple:
            state, clean = carry
            s, v = scores.own_logits(tile, j, products.scores(j)), products.values(j)
            if masked:
                s = jnp.where(scores.keep(tile, j), s, -jnp.inf)
            if masked and careful:
                clean, v = clean & all_finite(v, acc), finite(v)
            weights, weigh = kept_weights(operands, plan, tile, j), products.weigh
            if weights is not None:
                weigh = lambda p, v: products.weigh(p * weights, v)  # noqa: E731
            return absorb(state, s, v, weigh, products.exp), clean

        return at

    state = online.start(tile.rows, operands.v.shape[-1], acc)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (tile.heads, *x.shape)), state)
    visited = key_tiles(operands, tile)
    state, clean = over_key_tiles(operands, tile, visited, step, (state, jnp.array(True)))
    if careful:
        kept = lambda j: scores.kept_pairs(tile, j, products.scores)  # noqa: E731
        o = with_kept_nonfinite(operands, plan, tile, visited, kept, clean, state.o)
        state = state._replace(o=o)
    state = state._replace(o=products.finish(state.o))
    return with_sinks(operands, tile, state)


def _absorb(
    plan: Plan, tile: QueryTile, products: Products, masked: bool
) -> Callable[..., online.State]:
    """How a key tile joins the state: the only one needs no rescaling of what was before."""
    if tile.kv.count != 1:
        return products.absorb
    shift = (lambda m: m) if plan.fused and not masked else online.finite_shift
    return lambda _, s, v, weigh, exp: online.of_block(s, v, weigh, exp, shift)
