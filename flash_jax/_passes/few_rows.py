"""The forward pass of few query rows: all instances and heads at once, and keys read in place.

A loop reads a tile of keys through a slice, which XLA:CPU copies. Few rows against many keys take
no longer than reading these, so all keys are multiplied in one step. Only where no row reads more
than a part of them, as in a cache that is not full yet, is a loop over the tiles of that part
faster.

The scores of a step are all there at once. Above ``MOST_BYTES`` malloc has their memory mapped anew
in every call, and its pages, filled with zeros one by one, take longer than reading all keys again:
then the queries come in several steps.

A NaN or an infinity among the values reaches all rows, masked or not, since 0 * NaN is NaN. So
where the sums are not finite, they are computed again of finite values, in the format of the walk,
and rows get the others that they may read (``nonfinite``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._masks.schedule import SKIPPED
from .._tiles.axis import Axis
from .._tiles.tile import QueryTile
from .._tiles.xla import in_every_element
from . import online_softmax as online
from .nonfinite import finite, with_nonfinite
from .operands import Dimensions, Operands, kv_tile, varying_as, with_sinks
from .plan import Plan
from .products import Products
from .walk import over, whole_tile

C = TypeVar("C")

MOST_BYTES = 2**25  # the most that glibc takes from memory that it has kept


def over_few(operands: Operands, plan: Plan, step: Callable[[QueryTile, C], C], carry: C) -> C:
    """Folds ``step`` over the tiles of few queries, each of all instances and heads."""
    dims, few = Dimensions.of(operands, plan), plan.few
    assert few is not None
    steps = 1
    if operands.pages is None:  # else tiles of keys are read in any case
        size = dims.instances * dims.N * dims.S * few.score_bytes
        steps = -(-dims.T // max(few.least_queries, MOST_BYTES // size))
    q = Axis.of(dims.T, -(-dims.T // steps))
    tile = whole_tile(operands, plan)._replace(q=q, together=dims.instances)
    if steps == 1:
        return step(tile, carry)
    at = lambda i, carry: step(tile._replace(i=i), carry)  # noqa: E731
    return over(jnp.int32(q.count), at, varying_as(operands, carry))


def few_tile(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    """The state (instances, heads, rows) of a tile of ``over_few`` after all keys that it reads."""
    state = _state(operands, plan, tile)
    if not jnp.issubdtype(operands.v.dtype, jnp.floating):
        return state
    clean = in_every_element(jnp.isfinite(jnp.sum(state.o * 0)))
    return lax.cond(clean, lambda: state, lambda: _mended(operands, plan, tile))


def _state(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    """As ``few_tile``, where all values are finite."""
    whole = lambda: _step(operands, plan, tile, jnp.int32(0), start)  # noqa: E731
    start, tiles = _start(operands, plan, tile), _in_tiles(plan, tile)
    if tiles.kv.count == 1 and operands.pages is None:
        state = whole()
    else:
        read = tiles.each(lambda tile, operands: operands.scores.schedule_row(tile), operands)
        read = jnp.any(read != SKIPPED, axis=0)
        order, end = jnp.argsort(~read, stable=True), jnp.sum(read, dtype=np.int32)
        at = lambda i, state: _step(operands, plan, tiles, order[i].astype(np.int32), state)  # noqa: E731
        loop = lambda: over(end, at, varying_as(operands, start))  # noqa: E731
        few = 5 * tiles.kv.block * end <= 2 * tile.kv.length  # measured: about as fast there
        state = lax.cond(few, loop, whole) if operands.pages is None else loop()

    def finish(tile: QueryTile, arrays: tuple[Operands, online.State]) -> online.State:
        return with_sinks(arrays[0], tile, _of_instance(tile, arrays[1]))

    return tile.each(finish, (operands, state))


def _mended(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    """The state of all instances where some value is NaN or infinite, read or not."""
    start, tiles = _start(operands, plan, tile), _in_tiles(plan, tile)
    careful = dataclasses.replace(plan, few=plan.format)

    def at(j: Array, carry: tuple[online.State, Array]) -> tuple[online.State, Array]:
        def add(tile: QueryTile, arrays: tuple[Operands, Array]) -> Array:
            operands, others = arrays
            v = kv_tile(plan, tile, operands.v, j, others.dtype, operands.pages)
            products = lambda j: _products(operands, plan, tile).scores(j)  # noqa: E731
            kept = operands.scores.kept_pairs(tile, j, products)
            return with_nonfinite(kept, v, tile.of_instance(others))

        state, others = carry
        others = tiles.each(add, (operands, others))
        return _step(operands, careful, tiles, j, state, finite), others

    def finish(tile: QueryTile, arrays: tuple[Operands, online.State, Array]) -> online.State:
        operands, state, others = arrays
        state = _of_instance(tile, state)
        return with_sinks(operands, tile, state._replace(o=state.o + tile.of_instance(others)))

    carry = varying_as(operands, (start, jnp.zeros_like(start.o)))
    state, others = over(jnp.int32(tiles.kv.count), at, carry)
    return tile.each(finish, (operands, state, others))


def _in_tiles(plan: Plan, tile: QueryTile) -> QueryTile:
    return tile._replace(kv=Axis.of(tile.kv.length, plan.few_keys))


def _start(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    """The state of all instances before any key."""
    state = online.start(tile.rows, operands.v.shape[-1], Dimensions.of(operands, plan).acc)
    lead = tile.instances, tile.heads
    return online.State(*(jnp.broadcast_to(x, (*lead, *x.shape)) for x in state))


def _of_instance(tile: QueryTile, state: online.State) -> online.State:
    return online.State(*map(tile.of_instance, state))


def _step(
    operands: Operands,
    plan: Plan,
    tile: QueryTile,
    j: Array,
    state: online.State,
    clean: Callable[[Any], Any] = lambda v: v,
) -> online.State:
    """The state of all instances with key tile j; clean: what values become first."""

    def step(tile: QueryTile, arrays: tuple[Operands, online.State]) -> online.State:
        (operands, state), scores = arrays, arrays[0].scores
        products = _products(operands, plan, tile)
        s = scores.own_logits(tile, j, products.scores(j))
        if not scores.always_full(tile.kv):
            s = jnp.where(scores.keep(tile, j), s, -jnp.inf)
        values, weigh, exp = clean(products.values(j)), products.weigh, products.exp
        if tile.kv.count == 1:
            return online.of_block(s, values, weigh, exp)
        return online.absorb(_of_instance(tile, state), s, values, weigh, exp)

    return tile.each(step, (operands, state))


def _products(operands: Operands, plan: Plan, tile: QueryTile) -> Products:
    assert plan.few is not None
    return plan.few.products(operands, plan, tile)
