"""The signature of ``jax.nn.dot_product_attention``, for a one-line swap."""

from __future__ import annotations

from typing import Literal

from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .attention import attention_arguments, attention_of_floats
from .empty_rows import check_empty_rows, mean_in_empty_rows


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
    empty_rows: Literal["zero", "mean"] = "zero",
) -> Array | tuple[Array, Array]:
    """``flash_attention`` behind the signature of ``jax.nn.dot_product_attention``.

    After ``jax.nn.dot_product_attention = flash_jax.dot_product_attention`` code that calls JAX's
    function runs this one. Arguments that are not named below are those of ``jax.nn``.

    Args:
        query: (B, T, N, H) or (T, N, H).
        value: (B, S, K, Hv) or (S, K, Hv). Its head size may differ from that of key.
        bias: broadcastable to (B, N, T, S), of 0 to 4 axes.
        mask: bool, alike.
        query_seq_lengths: int32 (B,), or (1,) for a call without batch.
        key_value_seq_lengths: alike.
        implementation: None or "xla"; both run this library.
        return_residual: also return the log-sum-exp of the scores, (B, T, N) or (T, N), in key's
            dtype, without a gradient.
        empty_rows: not in ``jax.nn``. A row that may read no key is "zero", or the "mean" of value
            over all S, as in ``jax.nn``. Padded keys count in the mean, NaN included.

    Returns:
        As ``jax.nn``, except for a row that may read no key: empty_rows says what it is, and its
        residual is -inf.

    Raises:
        ValueError, TypeError: as ``flash_attention``.
        NotImplementedError: implementation is "cudnn".

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> dot_product_attention(x, x, x, is_causal=True).shape
        (1, 4, 2, 8)
    """
    if implementation == "cudnn":
        raise NotImplementedError("implementation must be None or 'xla'; it is 'cudnn'")
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation must be None or 'xla'; it is {implementation!r}")
    if not isinstance(return_residual, bool):
        raise TypeError(f"return_residual must be a bool; it is {return_residual!r}")
    check_empty_rows(empty_rows)
    for name, x in {"query": query, "key": key, "value": value}.items():
        if x is None:
            raise TypeError(f"{name} must be an array; it is NoneType")
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    shape = query.shape
    query, key, value = (x[None] if x.ndim == 3 else x for x in (query, key, value))
    *arrays, options = attention_arguments(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
    )
    asks_lse = return_residual or empty_rows == "mean"
    out, lse = attention_of_floats(*arrays, options._replace(lse=asks_lse))
    if lse is not None and empty_rows == "mean":
        out = mean_in_empty_rows(out, lse, value, query_seq_lengths)
    out = out.reshape(*shape[:-1], out.shape[-1])
    if lse is None or not return_residual:
        return out
    residual = lax.stop_gradient(jnp.swapaxes(lse, 1, 2)).astype(key.dtype)
    return out, residual.reshape(shape[:-1])
