"""Attention as its formula reads. It defines what is correct, and holds every score at once."""

from __future__ import annotations

import math

from jax import Array, nn
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.bind import Sizes, bind_reals
from .._checks.numbers import as_reals
from .._checks.shapes import accumulator, as_floats, check_qkv


def reference_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    """``softmax(scale * query @ key.T) @ value`` per head, holding all T x S scores.

    Args:
        query: (B, T, N, H) or (T, N, H), float32, bfloat16, float16, or float64 under x64.
        key: (B, S, K, H) or (S, K, H), dtype of query. Query head n reads head ``n // (N // K)``.
        value: (B, S, K, Hv) or (S, K, Hv), dtype of query.
        scale: factor on the logits, a scalar or (B,); default ``1 / sqrt(H)``.
        is_causal: query t reads keys 0..t.

    Returns:
        (B, T, N, Hv) or (T, N, Hv), dtype of query. Scores and softmax are float32 (float64 for
        float64); probabilities have the dtype of query.

    Raises:
        ValueError: shapes or dtypes disagree; the message names the argument.
        TypeError: an argument is no float array.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 5, 2, 8))
        >>> reference_attention(x, x, x, is_causal=True).shape
        (1, 5, 2, 8)

    References:
        Vaswani et al., Attention Is All You Need, 2017, equation 1, https://arxiv.org/abs/1706.03762
    """
    query, key, value = as_floats(query=query, key=key, value=value)
    check_qkv(query, key, value)
    groups = query.shape[-2] // max(key.shape[-2], 1)
    acc = accumulator(query.dtype)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else as_reals("scale", scale)
    scale = bind_reals("scale", scale, "", Sizes(B=query.shape[0], batched=query.ndim == 4))
    scale = scale.astype(acc).reshape(-1, *(1,) * (query.ndim - 1))
    key, value = jnp.repeat(key, groups, axis=-2), jnp.repeat(value, groups, axis=-2)
    s = jnp.einsum("...tnh,...snh->...nts", query, key, preferred_element_type=acc) * scale
    if is_causal:
        kept = jnp.broadcast_to(jnp.tri(*s.shape[-2:], dtype=bool), s.shape)
        s = jnp.where(kept, s, -jnp.inf)
    p = nn.softmax(s, axis=-1).astype(query.dtype)
    out = jnp.einsum("...nts,...snh->...tnh", p, value, preferred_element_type=acc)
    return out.astype(query.dtype)
