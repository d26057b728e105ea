"""Blocks of positions that share a scale, and scales that a caller gives: checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.core import Tracer

from .._checks.numbers import as_reals, positive_integer


def as_block_shape(
    block_shape: Sequence[int | None] | None, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Positions per block along each axis of an array of that shape."""
    if block_shape is None:
        block_shape = (None,) * len(shape)
    if not isinstance(block_shape, tuple | list):
        raise TypeError(f"block_shape must be a tuple or None; it is {block_shape!r}")
    if len(block_shape) != len(shape):
        raise ValueError(
            f"block_shape must have an entry per axis of x, {len(shape)}; it is {block_shape!r}"
        )
    return tuple(
        # An axis of no position is one block of one.
        max(size, 1) if block is None else min(positive_integer("block_shape", block), max(size, 1))
        for size, block in zip(shape, block_shape, strict=True)
    )


def given_scales(scales: Any, shape: tuple[int, ...], blocks: tuple[int, ...]) -> Array:
    """Scales that the caller gives, one per block."""
    scales = as_reals("scales", scales)
    if isinstance(scales, str | bool) or not jnp.issubdtype(
        jnp.asarray(scales).dtype, jnp.floating
    ):
        raise TypeError(f"scales must be floats; they are {scales!r}")
    if not isinstance(scales, Tracer) and bool(np.any(np.asarray(scales) < 0)):
        raise ValueError(f"scales must be >= 0; they are {scales}")
    counts = tuple(-(-size // block) for size, block in zip(shape, blocks, strict=True))
    scales = jnp.asarray(scales, np.float32)
    try:
        return jnp.broadcast_to(scales, counts)
    except ValueError:
        raise ValueError(
            f"scales must broadcast to one per block, {counts}; their shape is {scales.shape}"
        ) from None
