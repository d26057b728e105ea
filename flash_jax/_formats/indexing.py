"""Indexing of blocks: which values and which scales an index takes.

Along an axis in blocks a slice must have no step, and begin where a block does, so that blocks stay
blocks. A single position takes its block's scale. Where a scale serves the whole axis, or one
position, any index will do.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp


class Taken(NamedTuple):
    """What an index takes."""

    values: tuple[Any, ...]  # the index of values
    scales: tuple[Any, ...]  # and of scales
    blocks: tuple[int, ...]  # of the axes that are left
    whole: bool  # whether whole blocks are taken, so that scales may be set


def taken(index: Any, shape: tuple[int, ...], blocks: tuple[int, ...]) -> Taken:
    """What ``index`` takes of an array of that shape in blocks.

    Raises:
        TypeError: the index has something other than integers, slices and one ellipsis.
        IndexError: there are too many, or a slice begins within a block.
    """
    parts = index if isinstance(index, tuple) else (index,)
    dots = sum(part is Ellipsis for part in parts)
    if dots > 1 or len(parts) - dots > len(shape):
        raise IndexError(
            f"index must have at most {len(shape)} axes and one ellipsis; it is {index!r}"
        )
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    missing = (slice(None),) * (len(shape) - len(parts) + dots)
    parts = (*parts[:at], *missing, *parts[at + 1 :])
    values, scales, left, whole = [], [], [], True
    for axis, (part, size, block) in enumerate(zip(parts, shape, blocks, strict=True)):
        sole = block >= size  # one scale for the axis
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            full = (start, stop, step) == (0, size, 1)
            in_blocks = not sole and block > 1
            if in_blocks and (step != 1 or start % block):
                raise IndexError(
                    f"index must begin at a block of {block} along axis {axis}, and have no step; "
                    f"it is {part!r}"
                )
            of_scale = slice(start // block, -(-stop // block)) if in_blocks else part
            of_scale = slice(None) if sole else of_scale
            whole = whole and (full or block == 1 or (not sole and not stop % block))
            left.append(block)
        else:
            part = _integer(part, size)
            of_scale = 0 if sole else part // block
            whole = whole and block == 1
        values.append(part)
        scales.append(of_scale)
    return Taken(tuple(values), tuple(scales), tuple(left), whole)


def _integer(part: Any, size: int) -> Any:
    if hasattr(part, "dtype"):
        if part.ndim or not jnp.issubdtype(part.dtype, np.integer):
            raise TypeError(
                "index must hold integers, slices and one ellipsis; it has an array of "
                f"{part.dtype} with shape {part.shape}"
            )
        return jnp.where(part < 0, part + size, part)
    try:
        i = operator.index(part)
    except TypeError:
        raise TypeError(
            f"index must hold integers, slices and one ellipsis; it has {part!r}"
        ) from None
    if not -size <= i < size:
        raise IndexError(f"index must be in the axis of {size} positions; it is {i}")
    return i % size
