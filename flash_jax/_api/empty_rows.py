"""Rows that may read no key, as ``jax.nn`` has them.

In this library such a row is zero. In ``jax.nn.dot_product_attention`` its scores are all the same
large negative number, so its softmax is 1 / S for each key, masked or not, and the row is the mean
of value.
"""

from __future__ import annotations

from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.shapes import accumulator


def mean_in_empty_rows(
    out: Array, lse: Array, value: Array, query_seq_lengths: ArrayLike | None = None
) -> Array:
    """out (..., T, N, Hv) with the mean of value (..., S, K, Hv) where lse (..., N, T) is -inf.

    Query head n takes the mean of key/value head ``n // (N // K)``, without dropout. A row beyond
    query_seq_lengths (...,) stays zero, as in ``jax.nn``. The gradient of a mean goes to value.
    """
    empty = jnp.isneginf(jnp.swapaxes(lse, -1, -2))[..., None]  # (..., T, N, 1)
    if query_seq_lengths is not None:
        lengths = jnp.asarray(query_seq_lengths)[..., None, None, None]
        t = jnp.arange(out.shape[-3], dtype=lengths.dtype)
        empty = empty & (jnp.expand_dims(t, (*range(lengths.ndim - 3), -2, -1)) < lengths)
    mean = jnp.mean(value, axis=-3, keepdims=True, dtype=accumulator(value.dtype))
    mean = jnp.repeat(mean, out.shape[-2] // value.shape[-2], axis=-2).astype(out.dtype)
    return jnp.where(empty, mean, out)


def check_empty_rows(empty_rows: str) -> None:
    """Checks the option ``empty_rows``."""
    if empty_rows not in ("zero", "mean"):
        raise ValueError(f"empty_rows must be 'zero' or 'mean'; it is {empty_rows!r}")
