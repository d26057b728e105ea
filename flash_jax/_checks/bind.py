"""Options that are arrays: checked against the sizes of a call, and given a batch axis."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax import numpy as jnp

from .shapes import MAX_LENGTH, check_shape


class Sizes(NamedTuple):
    """The sizes that the arrays of options must fit; None fits any."""

    B: int | None = None
    N: int | None = None
    T: int | None = None
    S: int | None = None
    batched: bool = True  # False: the call has no batch axis
    K: int | None = None
    devices: int = 1  # of a ring, each of which has T queries and S keys


def bind_integers(name: str, x: Any, axes: str, sizes: Sizes) -> Array:
    """Integers of shape ``axes`` or (B, *axes), as an array whose first axis is B or 1.

    Scalars are positions: they become int32, clipped to where no sequence reaches, so that two of
    them add up without overflow. Others are ids, and keep their dtype.
    """
    x = _with_batch_axis(name, of_kind(name, x, "integers", np.integer), axes, sizes)
    if axes:
        return x
    info = jnp.iinfo(x.dtype)
    low, high = max(info.min, -MAX_LENGTH), min(info.max, MAX_LENGTH)
    low, high = np.array(low, x.dtype), np.array(high, x.dtype)
    return jnp.where(x < low, low, jnp.where(x > high, high, x)).astype(np.int32)


def bind_reals(name: str, x: Any, axes: str, sizes: Sizes) -> Array:
    """Real numbers of shape ``axes`` or (B, *axes), as an array whose first axis is B or 1."""
    if axes:
        x = of_kind(name, x, "floats", jnp.floating)
    return _with_batch_axis(
        name, of_kind(name, x, "real numbers", (np.integer, jnp.floating)), axes, sizes
    )


def bind_scores(name: str, x: Any, spelled: str, kind: type, sizes: Sizes) -> Array:
    """x, broadcastable to (B, N, T, S), with all four axes; each has its full size or 1."""
    x = of_kind(name, x, spelled, kind)
    full = (sizes.B, sizes.N, sizes.T, sizes.S)
    shape = (1,) * (4 - x.ndim) + x.shape
    if len(shape) != 4 or not all(
        n == 1 or m is None or n == m for n, m in zip(shape, full, strict=True)
    ):
        target = "(B, N, T, S)" if sizes.batched else "(1, N, T, S)"
        raise ValueError(f"{name} must broadcast to {target} = {full}; its shape is {x.shape}")
    return x.reshape(shape)


def _with_batch_axis(name: str, x: Array, axes: str, sizes: Sizes) -> Array:
    """x of shape ``axes`` or (B, *axes) with a first axis of size 1 or B."""
    expected = tuple(getattr(sizes, axis) for axis in axes)
    alone, batched = _spelled(axes) if axes else "a scalar", _spelled("B" + axes)
    if x.ndim == len(axes) + 1 and sizes.batched:
        check_shape(name, x, batched, (sizes.B, *expected))
        return x
    if x.ndim != len(axes):
        either = f"{alone} or {batched}" if sizes.batched else alone
        raise ValueError(f"{name} must be {either}; its shape is {x.shape}")
    check_shape(name, x, alone, expected)
    return x[None]


def _spelled(axes: str) -> str:
    """A shape as Python prints it: (T,) or (B, T)."""
    return f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"


def of_kind(name: str, x: Any, spelled: str, kinds: type | tuple[type, ...]) -> Array:
    """x as an array whose dtype is of one of the kinds, which errors call ``spelled``."""
    if x is None or isinstance(x, str):
        raise TypeError(f"{name} must be {spelled}; it is {x!r}")
    x = jnp.asarray(x)
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} must be {spelled}; its dtype is {x.dtype}")
    return x
