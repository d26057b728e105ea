"""Checks of arrays by shape and dtype; an error says what one must be and what it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import chex
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.experimental import jet

from .._tiles.symbolic import known

MAX_LENGTH = 2**30  # positions are int32, and the end of a tile is computed from its start
_FLOATS = ("float32", "bfloat16", "float16", "float64")


def accumulator(dtype: Any) -> np.dtype:
    """The dtype that sums over arrays of ``dtype`` have: float64 for float64, else float32."""
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
    """Raises: called in place of a primitive's rule, or before the primitive."""
    raise NotImplementedError(
        "attention has no Taylor series by jax.experimental.jet; nest jax.jvp for its derivatives"
    )


def as_int8(**arrays: object) -> list[Array]:
    """The arguments as arrays of int8."""
    return _as_integers(np.dtype(np.int8), arrays)


def as_int16(**arrays: object) -> list[Array]:
    """The arguments as arrays of int16."""
    return _as_integers(np.dtype(np.int16), arrays)


def _as_integers(dtype: np.dtype, arrays: dict[str, object]) -> list[Array]:
    converted = []
    for name, x in arrays.items():
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(f"{name} must be an array; it is {type(x).__name__}")
        converted.append(jnp.asarray(x))
        if converted[-1].dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; its dtype is {converted[-1].dtype}")
    return converted


@contextlib.contextmanager
def _saying(message: str) -> Iterator[None]:
    """Turns a failed assertion of Chex into a ValueError with this message."""
    try:
        yield
    except AssertionError:
        raise ValueError(message) from None


def check_rank(name: str, x: Array, axes: str, rank: int) -> None:
    """Checks the number of axes."""
    with _saying(f"{name} must be {axes}; its shape is {x.shape}"):
        chex.assert_rank(x, rank)


def check_shape(name: str, x: Array, axes: str, expected: tuple[int | None, ...]) -> None:
    """Checks the size of every axis; None accepts any size."""
    check_rank(name, x, axes, len(expected))
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    with _saying(f"{name} must be {axes} = ({sizes}); its shape is {x.shape}"):
        chex.assert_shape(x, expected)
    if max(filter(known, x.shape), default=0) >= MAX_LENGTH:
        raise ValueError(f"{name} must have axes shorter than 2**30; its shape is {x.shape}")


def check_heads(name: str, x: Any, sizes: tuple[Any, ...]) -> None:
    """Checks that the number and the size of heads are known at trace time, not symbolic."""
    if not all(map(known, sizes)):
        raise NotImplementedError(
            f"{name} may be symbolic in the axes B, T and S only; its shape is {x.shape}"
        )


def check_kernel(head_dim: int, q: Array, k: Array, v: Array) -> None:
    """Checks q (N, T, H), k (K, S, H) and v (K, S, Hv), or the same of one head: no N and K."""
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
    """Checks query (B, T, N, H), key (B, S, K, H) and value (B, S, K, Hv), or all without B.

    key and value may be anything that has the shape of an array.
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
