"""Every check of shapes and dtypes: an error names the argument, what it must be and what it is."""

from __future__ import annotations

import chex
from jax import Array
from jax import numpy as jnp

_FLOATS = ("float32", "bfloat16", "float16", "float64")


def as_floats(**arrays: object) -> list[Array]:
    """The arguments as arrays of one float dtype, the first one's."""
    converted: dict[str, Array] = {}
    for name, x in arrays.items():
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(f"{name} must be an array; it is {type(x).__name__}")
        converted[name] = jnp.asarray(x)
    first = next(iter(converted))
    dtype = converted[first].dtype
    for name, x in converted.items():
        if x.dtype.name not in _FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(_FLOATS)}; its dtype is {x.dtype}")
        if x.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of {first}, {dtype}; it is {x.dtype}")
    return list(converted.values())


def check_rank(name: str, x: Array, axes: str, rank: int) -> None:
    """Checks the number of axes, and that their sizes are known."""
    message = f"{name} must be {axes}; its shape is {x.shape}"
    chex.assert_rank(x, rank, exception_type=ValueError, custom_message=message)
    if not all(isinstance(size, int) for size in x.shape):
        raise NotImplementedError(f"{name} must have no symbolic sizes; its shape is {x.shape}")


def check_shape(name: str, x: Array, axes: str, expected: tuple[int | None, ...]) -> None:
    """Checks x against the sizes of its axes, None where any will do."""
    check_rank(name, x, axes, len(expected))
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    message = f"{name} must be {axes} = ({sizes}); its shape is {x.shape}"
    chex.assert_shape(x, expected, exception_type=ValueError, custom_message=message)
    # Positions are int32, and the end of a tile is computed from its start.
    if max(x.shape) >= 2**30:
        raise ValueError(f"{name} must have axes shorter than 2**30; its shape is {x.shape}")


def check_kernel(head_dim: int, q: Array, k: Array, v: Array) -> None:
    """Checks (N, T, H), (K, S, H), (K, S, Hv), or the same for one head without N and K."""
    if q.ndim == 2:
        check_shape("q", q, "(T, config.head_dim)", (None, head_dim))
        check_shape("k", k, "(S, config.head_dim)", (None, head_dim))
        check_shape("v", v, "(S of k, Hv)", (k.shape[0], None))
        return
    check_shape("q", q, "(N, T, config.head_dim)", (None, None, head_dim))
    check_shape("k", k, "(K, S, config.head_dim)", (None, None, head_dim))
    check_shape("v", v, "(K of k, S of k, Hv)", (*k.shape[:2], None))
    check_groups("q", q.shape[0], "k", k.shape[0])


def check_qkv(query: Array, key: Array, value: Array) -> None:
    """Checks (B, T, N, H), (B, S, K, H), (B, S, K, Hv), or all three without B."""
    if query.ndim not in (3, 4):
        raise ValueError(f"query must be (B, T, N, H) or (T, N, H); its shape is {query.shape}")
    B, b = query.shape[:-3], "B of query, " if query.ndim == 4 else ""
    check_shape("query", query, "(B, T, N, H)" if B else "(T, N, H)", (*B, None, None, None))
    check_shape("key", key, f"({b}S, K, H of query)", (*B, None, None, query.shape[-1]))
    check_shape("value", value, f"({b}S of key, K of key, Hv)", (*B, *key.shape[-3:-1], None))
    check_groups("query", query.shape[-2], "key", key.shape[-2])


def check_groups(q_name: str, N: int, k_name: str, K: int) -> None:
    """Checks that every key/value head serves equally many query heads."""
    if N != K and (K == 0 or N % K):
        raise ValueError(f"{q_name} heads must be a multiple of {k_name} heads; got N={N}, K={K}")
