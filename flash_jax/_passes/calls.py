"""Mapped axes: ``vmap`` makes several calls of one, whose instances are one axis to the passes.

Outside a pass each mapped axis stays an axis of its own, in front of the batch: one that is divided
over a mesh could not be merged with another without being gathered. Inside they are merged.

In every array a mapped axis, and the batch, is whole or has size 1, for all. An axis that is whole
has no other in front of it that is not: so entries serve equally many instances each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.symbolic import largest


def lead(leaves: Sequence[Any], calls: int) -> tuple[Any, ...]:
    """Sizes of the mapped axes, ``calls`` many, and of the batch."""
    return tuple(largest(x.shape[n] for x in leaves) for n in range(calls + 1))


def merge(leaves: Sequence[Array], calls: int) -> list[Array]:
    """The leaves with their mapped axes and the batch as one axis."""
    if not calls:
        return list(leaves)
    return [x.reshape(math.prod(x.shape[: calls + 1]), *x.shape[calls + 1 :]) for x in leaves]


def merged_shapes(leaves: Sequence[Any], calls: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of ``merge``."""
    return [
        jax.ShapeDtypeStruct((math.prod(x.shape[: calls + 1]), *x.shape[calls + 1 :]), x.dtype)
        for x in leaves
    ]


def split(leaves: Sequence[Any], leads: Sequence[tuple[Any, ...]]) -> list[Array]:
    """Leaves whose first axis becomes the axes of ``leads``."""
    return [
        x if len(sizes) == 1 else x.reshape(*sizes, *x.shape[1:])
        for x, sizes in zip(leaves, leads, strict=True)
    ]


def mapped(x: Array, axis: int | None, size: int, calls: int, spread: bool) -> Array:
    """A leaf with one more mapped axis in front.

    Args:
        axis: where it is in x; None: x serves all calls.
        size: of the axis.
        calls: mapped axes that x has already, apart from this one.
        spread: whether it must be whole in any case.
    """
    if axis is not None:
        return jnp.moveaxis(x, axis, 0)
    if not spread and all(n == 1 for n in x.shape[: calls + 1]):
        return lax.expand_dims(x, [0])
    return jnp.broadcast_to(x, (size, *x.shape))
