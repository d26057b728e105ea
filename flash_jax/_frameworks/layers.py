"""Attention as layers of models call it: any number of batch axes, one dtype by promotion."""

from __future__ import annotations

import math
from typing import Any, Literal

from jax import Array
from jax import numpy as jnp

from .._api.attention import flash_attention, flash_attention_with_lse
from .._api.empty_rows import check_empty_rows, mean_in_empty_rows
from .._masks.base import Mask


def attend(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    empty_rows: Literal["zero", "mean"] = "zero",
    **options: Any,
) -> Array:
    """``flash_attention`` of (..., T, N, H), (..., S, K, H) and (..., S, K, Hv).

    Args:
        bias: float, broadcastable to (..., N, T, S). It is copied per batch element where it has
            some of the batch axes, but not all.
        mask: of any dtype, 0 masks; shaped as bias. Or a ``Mask``, which sees the batch axes as
            one.
        empty_rows: a row that may read no key is "zero", or the "mean" of value over all S.
        options: of ``flash_attention``, which sees the batch axes as one.

    Raises:
        ValueError: batch axes disagree.
        ValueError, TypeError: as ``flash_attention``.
    """
    check_empty_rows(empty_rows)
    dtype = jnp.result_type(query, key, value, 0.0)  # 0.0: a float at least
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    for name, x in {"key": key, "value": value}.items():
        if x.shape[:-3] != batch:
            raise ValueError(f"{name} must have the batch axes {batch} of query; it is {x.shape}")
    if mask is not None and not isinstance(mask, Mask):
        mask = _one_batch_axis("mask", jnp.asarray(mask, bool), batch)
    if bias is not None:
        bias = _one_batch_axis("bias", jnp.asarray(bias), batch)
    if len(batch) > 1:
        query, key, value = (
            x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
        )
    if empty_rows == "zero":
        out = flash_attention(query, key, value, bias, mask, **options)
    else:
        out, lse = flash_attention_with_lse(query, key, value, bias, mask, **options)
        out = mean_in_empty_rows(out, lse, value, options.get("query_seq_lengths"))
    return out.reshape(*batch, *out.shape[-3:])


def _one_batch_axis(name: str, x: Array, batch: tuple[int, ...]) -> Array:
    """x, broadcastable to (..., N, T, S), with one batch axis at the most."""
    own = x.shape[:-3]
    if all(n == 1 for n in own):
        return x.reshape(x.shape[-3:])
    fits = zip(own[::-1], batch[::-1], strict=False)
    if len(own) > len(batch) or any(n not in (1, m) for n, m in fits):
        raise ValueError(
            f"{name} must broadcast to (..., N, T, S) with batch {batch}; its shape is {x.shape}"
        )
    return jnp.broadcast_to(x, batch + x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])
