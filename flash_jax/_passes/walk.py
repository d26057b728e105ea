"""The walk: over the tiles of queries, and over the key tiles that each of them may read.

All passes walk alike. A step of the outer loop is one tile of queries of some heads, and of one or
several instances; a step of the inner loop is one key tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._masks.base import Mask
from .._masks.schedule import HeadVisits, Visits, visits, visits_of_heads
from .._tiles.axis import Axis
from .._tiles.symbolic import as_int32, known
from .._tiles.tile import QueryTile
from .._tiles.xla import divided
from .operands import Dimensions, Operands, varying_as
from .plan import Plan

C = TypeVar("C")

# Where each head visits key tiles of its own: some small tiles make one large product. More heads
# in a step are faster, until they wait for the one that keeps the most.
VISITED_KEYS = 512
HEADS_PER_CORE = 4


def over_query_tiles(
    operands: Operands,
    plan: Plan,
    step: Callable[[QueryTile, C], C],
    carry: C,
    copies: int,
    several: bool = False,
    unless: Array | None = None,
) -> C:
    """Folds ``step`` over every tile of queries.

    Args:
        copies: how many arrays of a tile's scores live at once in a step.
        several: whether a step can do several instances.
        unless: a bool; where it is true, the carry is returned as it is.
    """
    dims, whole = Dimensions.of(operands, plan), whole_tile(operands, plan)
    q, kv = Axis.of(dims.T, plan.blocks.q), Axis.of(dims.S, plan.blocks.kv)
    # The tiles of pages are those of all heads.
    wide = tiles_per_visit(operands.scores.mask, kv) if operands.pages is None else None
    groups, width = whole.groups, kv.block * (wide or 1)
    heads = heads_per_step(plan.step_scores, dims.K, groups * q.block * width * copies)
    if wide is not None:
        heads = _divisor(dims.K, min(heads, HEADS_PER_CORE * plan.cores))
    together = 1
    if several and known(dims.instances) and heads == dims.K and wide is None:
        scores, keys = dims.N * q.block * kv.block, dims.K * kv.block * (dims.H + dims.Hv)
        if plan.step_numbers is not None and (kv.count == 1 or operands.scores.alike):
            numbers = keys + dims.N * q.block * (dims.H + dims.Hv)
            together = _divisor(dims.instances, plan.step_numbers // numbers)
        elif kv.count == 1:
            together = instances_per_step(plan.step_scores, dims.instances, scores * copies, keys)

    def at(count: Array, carry: C) -> C:
        instance, count = divided(count, as_int32(dims.K // heads * q.count))
        group, i = divided(count, as_int32(q.count))
        instance = instance * together
        tile = whole._replace(
            q=q,
            kv=kv,
            instance=instance,
            element=divided(instance, as_int32(plan.elements))[1],
            head=group * heads,
            heads=heads,
            i=i,
            together=together,
            wide=wide,
        )
        return step(tile, carry)

    steps = dims.instances // together * (dims.K // heads) * q.count
    if unless is None and known(steps) and steps == 1:
        return at(jnp.int32(0), carry)
    steps = as_int32(steps)
    if unless is not None:
        steps = jnp.where(unless, np.int32(0), steps)
    return _loop(np.int32(0), steps, at, varying_as(operands, carry))


def whole_tile(operands: Operands, plan: Plan) -> QueryTile:
    """All queries of all heads of the first instance, across from all keys."""
    dims, zero = Dimensions.of(operands, plan), jnp.int32(0)
    return QueryTile(
        Axis.of(dims.T, dims.T),
        Axis.of(dims.S, dims.S),
        instance=zero,
        instances=dims.instances,
        element=zero,
        elements=plan.elements,
        head=zero,
        heads=dims.K,
        groups=dims.N // dims.K,
        i=zero,
        origin=jax.tree.map(lambda x: x[0], operands.origin),
    )


def key_tiles(
    operands: Operands, tile: QueryTile, fused: bool = False
) -> Visits | HeadVisits | None:
    """The key tiles that ``over_key_tiles`` visits; None: all, and all alike.

    Skipped tiles, such as those above a causal diagonal, are not among them.

    Args:
        fused: which tiles are full, as ``Scores.always_full``.
    """
    scores = operands.scores
    if tile.wide is not None:
        assert scores.mask is not None
        return visits_of_heads(scores.mask, tile)
    if tile.kv.count == 1 or scores.always_full(tile.kv, fused):
        return None
    return visits(scores.schedule_row(tile, fused))


def over_key_tiles(
    operands: Operands,
    tile: QueryTile,
    visited: Visits | HeadVisits | None,
    step: Callable[[bool], Callable[[Array, C], C]],
    carry: C,
    fused: bool = False,
) -> C:
    """Folds ``step(masked=False)`` over the full key tiles, then ``step(True)`` over the partial.

    Args:
        visited: ``key_tiles`` of the same operands and tile.
        fused: as it was there.
    """
    scores = operands.scores
    carry = varying_as(operands, carry)
    if isinstance(visited, HeadVisits):
        return _over_tiles_of_heads(operands, tile, visited, step, carry, fused)
    if tile.kv.count == 1:
        return step(not scores.always_full(tile.kv, fused))(jnp.int32(0), carry)
    if visited is None:
        return _loop(np.int32(0), as_int32(tile.kv.count), step(False), carry)
    order, full, end = visited

    def at(masked: bool) -> Callable[[Array, C], C]:
        visit = step(masked)
        return lambda x, carry: visit(order[x], carry)

    if not scores.always_partial(fused):
        carry = _loop(np.int32(0), full, at(False), carry)
    return _loop(full, end, at(True), carry)


def _over_tiles_of_heads(
    operands: Operands,
    tile: QueryTile,
    visited: HeadVisits,
    step: Callable[[bool], Callable[[Array, C], C]],
    carry: C,
    fused: bool,
) -> C:
    """As ``over_key_tiles``, where every head visits tiles of its own, ``tile.wide`` at once.

    As long as all heads have that many full tiles, no mask is needed. What is left of these joins
    the partial ones, and with a visit that is not filled up, so do tiles that are none.
    """
    (order, full, end), wide = visited, tile.wide
    assert wide is not None

    def at(masked: bool) -> Callable[[Array, C], C]:
        visit = step(masked)
        return lambda x, carry: visit(lax.dynamic_slice_in_dim(order, x * wide, wide, 1), carry)

    filled = np.int32(0)
    if not operands.scores.always_partial(fused):
        filled = jnp.min(full) // np.int32(wide)
        carry = _loop(np.int32(0), filled, at(False), carry)
    return _loop(filled, (jnp.max(end) + np.int32(wide - 1)) // np.int32(wide), at(True), carry)


def first_visited(visited: Visits | HeadVisits | None) -> Array:
    """The key tile that ``over_key_tiles`` comes to first; (heads, 1) where each has its own."""
    if visited is None:
        return jnp.int32(0)
    return visited.order[:, :1] if isinstance(visited, HeadVisits) else visited.order[0]


def _loop(start: ArrayLike, end: ArrayLike, step: Callable[[Array, C], C], carry: C) -> C:
    """Folds step(i, carry) over start..end-1.

    Never a ``scan``: reverse mode through it would store every step, where it must be refused.
    """
    return lax.while_loop(
        lambda x: x[0] < end, lambda x: (x[0] + 1, step(*x)), (jnp.asarray(start), carry)
    )[1]


def over(count: Array, step: Callable[[Array, C], C], carry: C) -> C:
    """Folds step(i, carry) over 0..count-1, as the walk does."""
    return _loop(np.int32(0), count, step, carry)


def tiles_per_visit(mask: Mask | None, kv: Axis) -> int | None:
    """How many key tiles a visit takes where each head has its own; None: all share them.

    A mask of blocks has them, unless all keys are one tile.
    """
    if mask is None or mask.blocks is None or (known(kv.count) and kv.count == 1):
        return None
    count = max(1, VISITED_KEYS // kv.block)
    return min(count, kv.count) if known(kv.count) else count


def heads_per_step(step_scores: int, heads: int, scores: int) -> int:
    """How many key/value heads share a step; divides ``heads``.

    Args:
        step_scores: how many scores a step should hold.
        heads: key/value heads.
        scores: scores that live at once of one key/value head.
    """
    return _divisor(heads, step_scores // scores)


def instances_per_step(step_scores: int, instances: int, scores: int, keys: int) -> int:
    """How many instances share a step; divides ``instances``.

    All of them share it where their scores fit: their keys and values are then read in place, and
    not copied. Else a step holds half as many scores as other steps do, since it also holds the
    keys and values of its instances.

    Args:
        step_scores: how many scores a step should hold.
        instances: how many there are.
        scores: scores that live at once of one of them.
        keys: numbers in the keys and values of one of them.
    """
    if instances * scores <= step_scores:
        return instances
    return _divisor(instances, step_scores // 2 // max(scores, keys))


def _divisor(count: int, most: int) -> int:
    """The largest divisor of count that is at most ``most``, at least 1."""
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(1, most))
