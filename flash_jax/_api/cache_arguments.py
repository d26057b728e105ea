"""The arguments and results of caches: what all of them take and give."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from .._checks.bind import Sizes, bind_integers
from .._checks.numbers import as_option, check_integers, known_values
from .._checks.shapes import as_floats, check_shape

_DTYPES = ("float32", "bfloat16", "float16", "float64", "int8")


class CachedArrays(NamedTuple):
    """What a cache holds, in order of position."""

    key: Array  # (B, S, K, H)
    value: Array  # (B, S, K, Hv)
    first: Array  # (B,): position of key 0


AXES_IN_ORDER: Any = CachedArrays("BSK.", "BSK.", "B")  # pyright: ignore


def check_appended(
    key: Any,
    value: Any,
    lengths: Any,
    left_padded: Any,
    sizes: tuple[int, int, int, int],
) -> tuple[Array, Array, Array | None]:
    """New keys and values, and how many of them each row takes, (B,), or None: all of them.

    Sizes: B, K, H and Hv.
    """
    B, K, H, Hv = sizes
    key, value = as_floats(key=key, value=value)
    check_shape("key", key, "(B, T, K, H) of the cache", (B, None, K, H))
    T = key.shape[1]
    check_shape("value", value, "(B, T of key, K, Hv)", (B, T, K, Hv))
    if not isinstance(left_padded, bool):
        raise TypeError(f"left_padded must be a bool; it is {left_padded!r}")
    if lengths is None:
        return key, value, None
    count = row_integers("lengths", lengths, B)
    counts = known_values(count)
    if counts is not None and np.any((counts < 0) | (counts > T)):
        raise ValueError(f"lengths must be in 0..{T}; they are {counts.tolist()}")
    return key, value, count


def row_integers(name: str, x: Any, B: int) -> Array:
    """Integers, one for all rows or one per row, as int32 (B,)."""
    x = as_option(name, x)
    check_integers(name, x)
    return _row_integers(x, name, B)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _row_integers(x: Any, name: str, B: int) -> Array:
    return jnp.broadcast_to(bind_integers(name, x, "", Sizes(B)), (B,))


def chosen_rows(name: str, x: Any, B: int) -> Array:
    """Some of B rows, given as bools or as indices, as bool (B,)."""
    x = _as_array(name, x)
    if x.dtype == np.bool_:
        check_shape(name, x, "bool (B,) or indices", (B,))
        return x
    return _among(_in_range(name, x, B), B)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _among(rows: Array, B: int) -> Array:
    return jnp.zeros((B,), bool).at[rows].set(True)


def indices_of_rows(name: str, x: Any, B: int) -> Array:
    """Indices of some of B rows."""
    x = _in_range(name, _as_array(name, x), B)
    check_shape(name, x, "(rows of the new cache,)", (None,))
    return x


def as_cache_dtype(dtype: Any) -> np.dtype:
    """dtype as one that a cache may have, or an error that names it."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; it is {dtype!r}")
    return np.dtype(jax.dtypes.canonicalize_dtype(found))


def _as_array(name: str, x: Any) -> Array:
    x = as_option(name, x)
    if x is None or jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"{name} must be bools or integers; it is {x!r}")
    return jnp.asarray(x)


def _in_range(name: str, x: Array, B: int) -> Array:
    if not jnp.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{name} must be integers; its dtype is {x.dtype}")
    rows = known_values(x)
    if rows is not None and np.any((rows < 0) | (rows >= B)):
        raise ValueError(f"{name} must be in 0..{B - 1}; they are {rows.tolist()}")
    return x
