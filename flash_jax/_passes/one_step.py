"""The forward pass of few query rows: all instances, heads and keys in one step, without a loop.

A loop reads a tile of keys through a slice, which XLA:CPU copies. Few rows against many keys take
no longer than reading these, so the copy would double the time.

A NaN or an infinity among the values reaches all rows, masked or not, since 0 * NaN is NaN. So
where the sums are not finite, the walk over the tiles gives the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.layout import Layout
from .._tiles.tile import Axis, QueryTile
from .._tiles.xla import in_every_element
from . import online_softmax as online
from .operands import Dimensions, Operands, with_sinks
from .plan import Plan


def in_one_step(operands: Operands, plan: Plan, results: Any, exact: Callable[[], Any]) -> Any:
    """The results of the forward pass.

    Args:
        results: of their type, shapes and dtypes.
        exact: gives them by the walk.
    """
    dims = Dimensions.of(operands, plan)
    zero = np.int32(0)
    tile = QueryTile(
        Axis.of(dims.T, dims.T),
        Axis.of(dims.S, dims.S),
        instance=jnp.asarray(zero),
        instances=dims.instances,
        element=jnp.asarray(zero),
        elements=plan.elements,
        head=jnp.asarray(zero),
        heads=dims.K,
        groups=dims.N // dims.K,
        i=jnp.asarray(zero),
        together=dims.instances,
    )
    state = tile.each(lambda tile, operands: _state(operands, plan, tile), operands)
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


def _state(operands: Operands, plan: Plan, tile: QueryTile) -> online.State:
    """The state (heads, rows) of one instance."""
    assert plan.one_step is not None
    scores, j = operands.scores, jnp.int32(0)
    products = plan.one_step.products(operands, plan, tile)
    s = scores.logits(tile, j, scores.local(tile, j), products.scores(j))
    if not scores.always_full(tile.kv):
        s = jnp.where(scores.keep(tile, j), s, -jnp.inf)
    state = online.of_block(s, products.values(j), products.weigh, products.exp)
    return with_sinks(operands, tile, state._replace(o=products.finish(state.o)))
