"""Sizes that are symbols while ``jax.export`` traces, and numbers when the program runs.

B, T and S may be symbolic: the ends of the loops over batch elements and tiles are then computed at
run time. A tile needs a size, so a symbolic length is padded to whole tiles: padded keys are
masked, and padded queries are cut off again.

https://docs.jax.dev/en/latest/export/shape_poly.html
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jax import Array
from jax import numpy as jnp


def known(size: Any) -> bool:
    """Whether a size is a number, not a symbol."""
    return isinstance(size, int)


def as_int32(size: Any) -> Any:
    """A size as an int32, traced where the size is symbolic."""
    return np.int32(size) if known(size) else jnp.asarray(size, np.int32)


def largest(sizes: Iterable[Any]) -> Any:
    """The largest of sizes, symbols among them: the one that all others divide."""
    sizes = list(sizes)
    if 0 in sizes:
        return 0
    return next(size for size in sizes if all(size % n == 0 for n in sizes))


def padding(length: Any, block: int) -> Any:
    """How many positions fill a symbolic length up to whole tiles; 0 for a number."""
    return 0 if known(length) else -(-length // block) * block - length


def pad_axes(x: Array, axes: str, missing: dict[str, Any]) -> Array:
    """x with ``missing`` zeros behind each of its axes, by name; axes of size 1 stay."""
    widths = [
        (0, 0 if size == 1 else missing.get(axis, 0))
        for size, axis in zip(x.shape, axes, strict=True)
    ]
    return x if all(width == (0, 0) for width in widths) else jnp.pad(x, widths)
