"""Checks of options by value; an error says what one must be and what it is."""

from __future__ import annotations

import numbers
import reprlib
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.core import Tracer

from .._tiles.axis import BlockSizes
from .shapes import MAX_LENGTH

_PROBABILITIES = ("uint8", "bfloat16", "float32")


def as_option(name: str, x: Any) -> Any:
    """An option that may be traced, as None, a number or an array.

    Lists become arrays, since ``jit`` would take them apart. Real numbers of other kinds, such as
    fractions, become floats.
    """
    if isinstance(x, np.ndarray) and x.dtype.kind in "OSU":
        x = x.tolist()  # JAX has no arrays of objects and strings
    if isinstance(x, list | tuple):
        return _of_list(name, x)
    if x is None or isinstance(x, int) or (hasattr(x, "dtype") and hasattr(x, "shape")):
        return x
    if not isinstance(x, numbers.Real):
        raise TypeError(
            f"{name} must be a number, a list of numbers, an array or None; it is "
            f"{type(x).__name__}"
        )
    return _as_float(x)


def _of_list(name: str, x: list[Any] | tuple[Any, ...]) -> Any:
    """The numbers of a list, or of lists of equally long lists, as an array."""
    traced = any(isinstance(leaf, Array) for leaf in jax.tree.leaves(x))
    try:
        array = jnp.asarray(x) if traced else np.asarray(x)
    except (TypeError, ValueError):  # ragged, for example
        array = None
    if isinstance(array, np.ndarray) and array.dtype == object:
        entries = list(array.flat)
        if all(isinstance(n, numbers.Real) for n in entries):
            array = np.array([_as_float(n) for n in entries]).reshape(array.shape)
    kinds = np.bool_, np.integer, jnp.floating
    if array is None or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(
            f"{name} must hold real numbers, in lists of one length; it is {reprlib.repr(x)}"
        )
    return array


def _as_float(x: Any) -> float:
    """A real number of any kind as a float, infinite where it is too large for one."""
    try:
        return float(x)
    except OverflowError:
        return np.inf if x > 0 else -np.inf


def check_bool(name: str, x: Any) -> bool:
    """x as a bool that is known at trace time, or an error that names it."""
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, known at trace time; it is {x!r}")
    return bool(x)


def as_reals(name: str, x: Any, *, positive: bool = False) -> Any:
    """Real numbers. Where their values are known, they must be finite, and > 0 if ``positive``."""
    x = as_option(name, x)
    if isinstance(x, int) and not isinstance(x, bool):
        x = _as_float(x)
    if x is None or isinstance(x, bool | Tracer):
        return x
    own = getattr(x, "dtype", float)
    if any(jnp.issubdtype(own, kind) for kind in (np.integer, jnp.floating)):
        dtype = jax.dtypes.canonicalize_dtype(float)
        with np.errstate(over="ignore"):
            known = np.asarray(x).astype(dtype)
        if not np.all(np.isfinite(known) & (known > 0 if positive else True)):
            also = " and > 0" if positive else ""
            raise ValueError(f"{name} must be finite in {dtype}{also}; it is {x}")
    return x


def as_scale(name: str, x: Any) -> Any:
    """One real number. Where its value is known, it must be >= 0, and finite in float32."""
    if hasattr(x, "dtype"):
        real = any(jnp.issubdtype(x.dtype, kind) for kind in (np.integer, jnp.floating))
    else:
        real = isinstance(x, numbers.Real) and not isinstance(x, bool)
    if not real:
        raise TypeError(f"{name} must be a real number or a scalar array of one; it is {x!r}")
    shape = getattr(x, "shape", ())
    if shape:
        raise ValueError(f"{name} must be a scalar; its shape is {shape}")
    if isinstance(x, Tracer):
        return x
    value = _as_float(x)
    if not 0 <= value <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be finite in float32 and >= 0; it is {value}")
    return x if hasattr(x, "dtype") else value


def check_dropout(name: str, rate: Any, rng_name: str, rng: Any) -> float:
    """The rate as a float in [0, 1); checks the PRNG key, too, which a rate > 0 needs."""
    if isinstance(rate, bool) or not isinstance(rate, float | int | np.floating):
        raise TypeError(f"{name} must be a number, known at trace time; it is {rate!r}")
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be in [0, 1); it is {rate!r}")
    if rate and rng is None:
        raise ValueError(f"{rng_name} must be given where {name} is > 0; it is None")
    if rng is not None:
        typed = hasattr(rng, "dtype") and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
        raw = hasattr(rng, "dtype") and rng.dtype == np.uint32 and rng.ndim == 1
        if raw:
            try:
                jax.random.wrap_key_data(rng)
            except TypeError:  # not of the size of the default implementation
                raw = False
        if not (raw or (typed and rng.ndim == 0)):
            raise TypeError(f"{rng_name} must be one PRNG key; it is {rng!r}")
    return float(rate)


def check_probability_dtype(name: str, dtype: Any) -> np.dtype:
    """dtype as one that probabilities may be rounded to, or an error that names it."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or found.name not in _PROBABILITIES:
        raise ValueError(f"{name} must be one of {', '.join(_PROBABILITIES)}; it is {dtype!r}")
    return found


def check_window(name: str, window: Any) -> tuple[int | None, int | None] | None:
    """A window, given as None, w or (left, right), as None or a pair; or an error that names it."""
    if window is None:
        return None
    if isinstance(window, tuple | list):
        if len(window) != 2:
            raise ValueError(f"{name} must be an integer or (left, right); it is {window!r}")
    else:
        window = (window, window)
    left, right = (window_side(name, side) for side in window)
    return left, right


def window_side(name: str, side: Any) -> int | None:
    """One side of a window as an int >= 0 or None, or an error that names it."""
    if side is None:
        return None
    if isinstance(side, bool) or not isinstance(side, numbers.Integral):
        raise TypeError(f"{name} must be an integer or None; it is {side!r}")
    if side < 0:
        raise ValueError(f"{name} must be >= 0; it is {side!r}")
    return min(int(side), MAX_LENGTH)  # wider than any sequence is open


def check_integers(name: str, x: Any) -> None:
    """Checks that integers fit into JAX's integer dtype where their values are known."""
    if isinstance(x, numbers.Integral):
        low = high = int(x)
        dtype = np.dtype(np.int32)
    elif isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.size:
        low, high = int(x.min()), int(x.max())
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    else:
        return
    info = np.iinfo(dtype)
    if low < info.min or high > info.max:
        shown = low if low < info.min else high
        raise ValueError(f"{name} must fit into {dtype}; it is {_shown(shown)}")


def _shown(x: int) -> str:
    """An integer; Python refuses to print the longest."""
    return str(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


def known_values(tree: Any) -> Any:
    """Arrays with their values, in NumPy; None: some are traced, or lie in other processes."""
    leaves, structure = jax.tree.flatten(tree)
    for x in leaves:
        if isinstance(x, Tracer):
            return None
        if isinstance(x, Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return None
    return structure.unflatten(map(np.asarray, leaves))


def natural_number(name: str, value: object) -> int:
    """value as an int >= 0, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; it is {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0; it is {value!r}")
    return int(value)


def positive_integer(name: str, value: object) -> int:
    """value as an int > 0, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; it is {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be > 0; it is {value!r}")
    return int(value)


def as_block_sizes(block_sizes: Any) -> BlockSizes:
    """A pair of positive integers as ``BlockSizes``, or an error that names it."""
    if not isinstance(block_sizes, tuple | list) or len(block_sizes) != 2:
        raise TypeError(f"block_sizes must be a pair of integers; it is {block_sizes!r}")
    q = positive_integer("block_sizes.q", block_sizes[0])
    return BlockSizes(q, positive_integer("block_sizes.kv", block_sizes[1]))
