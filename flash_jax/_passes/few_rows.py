"""The forward pass of few query rows: all instances and heads at once, and keys read in place.

A loop reads a tile of keys through a slice, which XLA:CPU copies. Few rows against many keys take
no longer than reading these, so all keys are multiplied in one step. Only where no row reads more
than a part of them, as in a cache that is not full yet, is a loop over the tiles of that part
faster.

A NaN or an infinity among the values reaches all rows, masked or not, since 0 * NaN is NaN. So
where the sums are not finite, the walk over the tiles gives the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._masks.schedule import SKIPPED
from .._tiles.layout import Layout
from .._tiles.tile import Axis, QueryTile
from .._tiles.xla import in_every_element
from . import online_softmax as online
from .operands import Dimensions, Operands, varying_as, with_sinks
from .plan import Plan


def attend_few(operands: Operands, plan: Plan, results: Any, exact: Callable[[], Any]) -> Any:
    """The results of the forward pass.

    Args:
        results: of their type, shapes and dtypes.
        exact: gives them by the walk.
    """
    dims = Dimensions.of(operands, plan)
    state = _state(operands, plan, _all_rows(dims, plan, dims.S))
    out, lse = online.finish(state)
    out = out.reshape(dims.instances, dims.N, dims.T, dims.Hv).astype(plan.dtype)
    if plan.layout is Layout.HEADS_LAST:
        out = jnp.swapaxes(out, 1, 2)
    rows = (x.reshape(results.lse.shape) for x in (lse, state.m, state.l))
    fast = type(results)(out, *rows)
    if not jnp.issubdtype(operands.v.dtype, jnp.floating):
        return fast
    clean = in_every_element(jnp.isfinite(jnp.sum(state.o * 0)))
    return lax.cond(clean, lambda: fast, exact)


def _all_rows(dims: Dimensions, plan: Plan, block_kv: int) -> QueryTile:
    """All queries of all heads and instances, across from tiles of keys."""
    zero = jnp.int32(0)
    return QueryTile(
        Axis.of(dims.T, dims.T),
        Axis.of(dims.S, block_kv),
        instance=zero,
        instances=dims.instances,
        element=zero,
        elements=plan.elements,
        head=zero,
        heads=dims.K,
        groups=dims.N // dims.K,
        i=zero,
        together=dims.instances,
    )


def _state(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    """The state (instances, heads, rows) after all keys that are read."""
    part, S = plan.few_keys, tile.kv.length
    start = tile.each(lambda tile, operands: _start(operands, plan, tile), operands)
    whole = lambda: _step(operands, plan, tile, jnp.int32(0), start)  # noqa: E731
    if part >= S:
        state = whole()
    else:
        tiles = tile._replace(kv=Axis.of(S, part))
        read = tiles.each(lambda tile, operands: operands.scores.schedule_row(tile), operands)
        read = jnp.any(read != SKIPPED, axis=0)
        order, end = jnp.argsort(~read, stable=True), jnp.sum(read, dtype=np.int32)

        def body(carry: tuple[Array, online.State]) -> tuple[Array, online.State]:
            i, state = carry
            return i + 1, _step(operands, plan, tiles, order[i].astype(np.int32), state)

        def loop() -> online.State:
            carry = varying_as(operands, (jnp.int32(0), start))
            return lax.while_loop(lambda carry: carry[0] < end, body, carry)[1]

        state = lax.cond(5 * part * end <= 2 * S, loop, whole)

    def finish(tile: QueryTile, arrays: tuple[Operands, online.State]) -> online.State:
        operands, state = arrays
        return with_sinks(operands, tile, online.State(*map(tile.of_instance, state)))

    return tile.each(finish, (operands, state))


def _start(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    acc = Dimensions.of(operands, plan).acc
    state = online.start(tile.rows, operands.v.shape[-1], acc)
    return online.State(*(jnp.broadcast_to(x, (tile.heads, *x.shape)) for x in state))


def _step(
    operands: Operands, plan: Plan, tile: QueryTile, j: Array, state: online.State
) -> online.State:
    """The state of all instances with key tile j."""

    def step(tile: QueryTile, arrays: tuple[Operands, online.State]) -> online.State:
        (operands, state), scores = arrays, arrays[0].scores
        assert plan.few is not None
        products = plan.few.products(operands, plan, tile)
        s = scores.logits(tile, j, scores.local(tile, j), products.scores(j))
        if not scores.always_full(tile.kv):
            s = jnp.where(scores.keep(tile, j), s, -jnp.inf)
        values, weigh, exp = products.values(j), products.weigh, products.exp
        if tile.kv.count == 1:
            return online.of_block(s, values, weigh, exp)
        return online.absorb(online.State(*map(tile.of_instance, state)), s, values, weigh, exp)

    return tile.each(step, (operands, state))
