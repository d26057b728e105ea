"""Every check of shapes and dtypes: an error names the argument, what it must be and what it is."""

from __future__ import annotations

import contextlib
import numbers
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.core import Tracer
from jax.experimental import jet

from .._tiles.symbolic import known
from .._tiles.tile import BlockSizes

_MAX_LENGTH = 2**30
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_PROBABILITIES = ("uint8", "bfloat16", "float32")


def accumulator(dtype: Any) -> np.dtype:
    """What numbers of the dtype are summed in: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def as_floats(**arrays: object) -> list[Array]:
    """The arguments as arrays of one float dtype, the first one's."""
    converted: dict[str, Array] = {}
    for name, x in arrays.items():
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(f"{name} must be an array; it is {type(x).__name__}")
        if isinstance(x, jet.JetTracer):
            no_taylor_series()
        converted[name] = jnp.asarray(x)
    first = next(iter(converted))
    dtype = converted[first].dtype
    for name, x in converted.items():
        if x.dtype.name not in _FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(_FLOATS)}; its dtype is {x.dtype}")
        if x.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of {first}, {dtype}; it is {x.dtype}")
    return list(converted.values())


def no_taylor_series(*_: Any, **__: Any) -> Any:
    """Raises, as the rule of a primitive or before one."""
    raise NotImplementedError(
        "attention has no Taylor series by jax.experimental.jet; nest jax.jvp for its derivatives"
    )


def as_int8(**arrays: object) -> list[Array]:
    """The arguments as arrays of int8."""
    converted = []
    for name, x in arrays.items():
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(f"{name} must be an array; it is {type(x).__name__}")
        converted.append(jnp.asarray(x))
        if converted[-1].dtype != np.int8:
            raise TypeError(f"{name} must be int8; its dtype is {converted[-1].dtype}")
    return converted


@contextlib.contextmanager
def _saying(message: str) -> Iterator[None]:
    """Fails as a ValueError that says our sentence where one of Chex's assertions fails."""
    try:
        yield
    except AssertionError:
        raise ValueError(message) from None


def check_rank(name: str, x: Array, axes: str, rank: int) -> None:
    """Checks the number of axes."""
    with _saying(f"{name} must be {axes}; its shape is {x.shape}"):
        chex.assert_rank(x, rank)


def check_shape(name: str, x: Array, axes: str, expected: tuple[int | None, ...]) -> None:
    """Checks x against the sizes of its axes, None where any will do."""
    check_rank(name, x, axes, len(expected))
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    with _saying(f"{name} must be {axes} = ({sizes}); its shape is {x.shape}"):
        chex.assert_shape(x, expected)
    # Positions are int32, and the end of a tile is computed from its start.
    if max(filter(known, x.shape), default=0) >= _MAX_LENGTH:
        raise ValueError(f"{name} must have axes shorter than 2**30; its shape is {x.shape}")


def check_heads(name: str, x: Any, sizes: tuple[Any, ...]) -> None:
    """Checks that numbers and sizes of heads are no symbols."""
    if not all(map(known, sizes)):
        raise NotImplementedError(
            f"{name} may be symbolic in the axes B, T and S only; its shape is {x.shape}"
        )


def check_kernel(head_dim: int, q: Array, k: Array, v: Array) -> None:
    """Checks (N, T, H), (K, S, H), (K, S, Hv), or the same for one head without N and K."""
    if q.ndim == 2:
        check_shape("q", q, "(T, config.head_dim)", (None, head_dim))
        check_shape("k", k, "(S, config.head_dim)", (None, head_dim))
        check_shape("v", v, "(S of k, Hv)", (k.shape[0], None))
        check_heads("v", v, v.shape[1:])
        return
    check_shape("q", q, "(N, T, config.head_dim)", (None, None, head_dim))
    check_shape("k", k, "(K, S, config.head_dim)", (None, None, head_dim))
    check_shape("v", v, "(K of k, S of k, Hv)", (*k.shape[:2], None))
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_heads(name, x, (x.shape[0], x.shape[2]))
    check_groups("q", q.shape[0], "k", k.shape[0])


def check_qkv(query: Array, key: Any, value: Any) -> None:
    """Checks (B, T, N, H), (B, S, K, H), (B, S, K, Hv), or all three without B.

    key and value are arrays, or have a shape as these do.
    """
    if query.ndim not in (3, 4):
        raise ValueError(f"query must be (B, T, N, H) or (T, N, H); its shape is {query.shape}")
    if query.shape[-1] == 0:
        raise ValueError(f"query must have a head size H > 0; its shape is {query.shape}")
    B, b = query.shape[:-3], "B of query, " if query.ndim == 4 else ""
    check_shape("query", query, "(B, T, N, H)" if B else "(T, N, H)", (*B, None, None, None))
    check_shape("key", key, f"({b}S, K, H of query)", (*B, None, None, query.shape[-1]))
    check_shape("value", value, f"({b}S of key, K of key, Hv)", (*B, *key.shape[-3:-1], None))
    for name, x in {"query": query, "key": key, "value": value}.items():
        check_heads(name, x, x.shape[-2:])
    check_groups("query", query.shape[-2], "key", key.shape[-2])


def check_groups(q_name: str, N: int, k_name: str, K: int) -> None:
    """Checks that every key/value head serves equally many query heads."""
    if N != K and (K == 0 or N % K):
        raise ValueError(f"{q_name} heads must be a multiple of {k_name} heads; got N={N}, K={K}")


class Sizes(NamedTuple):
    """The sizes that the arrays of options must fit; None fits any."""

    B: int | None = None
    N: int | None = None
    T: int | None = None
    S: int | None = None
    batched: bool = True  # False: the call has no batch axis


def bind_integers(name: str, x: Any, axes: str, sizes: Sizes) -> Array:
    """Integers of shape ``axes`` or (B, *axes), as an array whose first axis is B or 1.

    Scalars are positions: they become int32, cut to where no sequence reaches, so that two of them
    add up without overflow. Others are ids, and keep their dtype.
    """
    x = _bind_rows(name, _of_kind(name, x, "integers", np.integer), axes, sizes)
    if axes:
        return x
    info = jnp.iinfo(x.dtype)
    low, high = max(info.min, -_MAX_LENGTH), min(info.max, _MAX_LENGTH)
    low, high = np.array(low, x.dtype), np.array(high, x.dtype)
    return jnp.where(x < low, low, jnp.where(x > high, high, x)).astype(np.int32)


def bind_reals(name: str, x: Any, axes: str, sizes: Sizes) -> Array:
    """Real numbers of shape ``axes`` or (B, *axes), as an array whose first axis is B or 1."""
    if axes:
        x = _of_kind(name, x, "floats", jnp.floating)
    return _bind_rows(
        name, _of_kind(name, x, "real numbers", (np.integer, jnp.floating)), axes, sizes
    )


def bind_scores(name: str, x: Any, spelled: str, kind: type, sizes: Sizes) -> Array:
    """x broadcastable to (B, N, T, S), with all four axes, each of its full size or 1."""
    x = _of_kind(name, x, spelled, kind)
    full = (sizes.B, sizes.N, sizes.T, sizes.S)
    shape = (1,) * (4 - x.ndim) + x.shape
    if len(shape) != 4 or not all(
        n == 1 or m is None or n == m for n, m in zip(shape, full, strict=True)
    ):
        target = "(B, N, T, S)" if sizes.batched else "(1, N, T, S)"
        raise ValueError(f"{name} must broadcast to {target} = {full}; its shape is {x.shape}")
    return x.reshape(shape)


def _bind_rows(name: str, x: Array, axes: str, sizes: Sizes) -> Array:
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
    return f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"


def _of_kind(name: str, x: Any, spelled: str, kinds: type | tuple[type, ...]) -> Array:
    if x is None or isinstance(x, str):
        raise TypeError(f"{name} must be {spelled}; it is {x!r}")
    x = jnp.asarray(x)
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} must be {spelled}; its dtype is {x.dtype}")
    return x


def as_option(name: str, x: Any) -> Any:
    """An option that may be traced, as None, a number or an array.

    Lists are arrays before ``jit`` takes them apart, and real numbers of other kinds are floats.
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
    """A real number of any kind; infinite where it is too large."""
    try:
        return float(x)
    except OverflowError:
        return np.inf if x > 0 else -np.inf


def check_bool(name: str, x: Any) -> bool:
    """x as a bool that is known before any value is, or an error that names it."""
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, known at trace time; it is {x!r}")
    return bool(x)


def as_reals(name: str, x: Any, *, positive: bool = False) -> Any:
    """Real numbers, which must be finite, or also > 0, where their values are known."""
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
    """One real number, which must be >= 0 and finite in float32 where its value is known."""
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
    """The rate as a float in [0, 1), with a key where one is needed."""
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
    """dtype as one that probabilities can be rounded to, or an error that names it."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or found.name not in _PROBABILITIES:
        raise ValueError(f"{name} must be one of {', '.join(_PROBABILITIES)}; it is {dtype!r}")
    return found


def check_window(name: str, window: Any) -> tuple[int | None, int | None] | None:
    """None, w or (left, right) as None or a pair of sides, or an error that names it."""
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
    return min(int(side), _MAX_LENGTH)  # wider than any sequence is open


def check_integers(name: str, x: Any) -> None:
    """Checks that integers, where their values are known, are of the integers that JAX has."""
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


def natural_number(name: str, value: object) -> int:
    """value as an int, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; it is {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0; it is {value!r}")
    return int(value)


def positive_integer(name: str, value: object) -> int:
    """value as an int, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; it is {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be > 0; it is {value!r}")
    return int(value)


def as_block_sizes(block_sizes: Any) -> BlockSizes:
    """A pair of positive integers, or an error that names it."""
    if not isinstance(block_sizes, tuple | list) or len(block_sizes) != 2:
        raise TypeError(f"block_sizes must be a pair of integers; it is {block_sizes!r}")
    q = positive_integer("block_sizes.q", block_sizes[0])
    return BlockSizes(q, positive_integer("block_sizes.kv", block_sizes[1]))
