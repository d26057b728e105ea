"""The kernels: attention of one head and of many, heads first, with their tiles in a config."""

from __future__ import annotations

import functools

import jax
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from ._config import FlashAttentionConfig
from ._masks import CausalMask
from ._operands import Operands, Static
from ._primitives import attention
from ._scores import Scores
from ._shapes import Sizes, as_floats, check_kernel, check_rank
from ._tiles import Layout


def flash_attention_forward(
    config: FlashAttentionConfig, q: ArrayLike, k: ArrayLike, v: ArrayLike
) -> Array:
    """Computes ``softmax(scale * q @ k.T) @ v`` of one head, in memory linear in T and S.

    Args:
        config: tile sizes, head size, causal flag and scale.
        q: (T, H), float32, bfloat16, float16, or float64 under x64; H is ``config.head_dim``.
        k: (S, H), dtype of q.
        v: (S, Hv), dtype of q.

    Returns:
        (T, Hv), dtype of q, summed in float32 (float64 for float64). A row that may read no key is
        zero; a masked key or value changes nothing, NaN and inf included.

    Raises:
        ValueError: shapes disagree with each other or with config; the message names the argument.
        TypeError: config is no FlashAttentionConfig, or an argument is no float array.

    Example:
        >>> import jax.numpy as jnp
        >>> config = FlashAttentionConfig.for_head_dim(8, causal=True)
        >>> x = jnp.ones((5, 8))
        >>> flash_attention_forward(config, x, x, x).shape
        (5, 8)

    References:
        [1] Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
    """
    _check_config(config)
    q, k, v = as_floats(q=q, k=k, v=v)
    check_rank("q", q, "(T, H)", 2)
    check_kernel(config.head_dim, q, k, v)
    return _attention(config, q[None], k[None], v[None])[0]


def flash_mha(config: FlashAttentionConfig, q: ArrayLike, k: ArrayLike, v: ArrayLike) -> Array:
    """Computes ``softmax(scale * q @ k.T) @ v`` per head, in memory linear in T and S.

    Args:
        config: tile sizes, head size, causal flag and scale; the same for every head.
        q: (N, T, H), float32, bfloat16, float16, or float64 under x64; H is ``config.head_dim``.
        k: (K, S, H), dtype of q. Query head n reads key/value head ``n // (N // K)`` [2].
        v: (K, S, Hv), dtype of q.

    Returns:
        (N, T, Hv), dtype of q, summed in float32 (float64 for float64). A row that may read no key
        is zero; a masked key or value changes nothing, NaN and inf included.

    Raises:
        ValueError: shapes disagree with each other or with config; the message names the argument.
        TypeError: config is no FlashAttentionConfig, or an argument is no float array.

    Example:
        >>> import jax.numpy as jnp
        >>> config = FlashAttentionConfig.auto(8, seq_len_q=5, seq_len_kv=7)
        >>> q, kv = jnp.ones((4, 5, 8)), jnp.ones((2, 7, 8))
        >>> flash_mha(config, q, kv, kv).shape
        (4, 5, 8)

    References:
        [1] Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
        [2] Ainslie et al., GQA, 2023, https://arxiv.org/abs/2305.13245
    """
    _check_config(config)
    q, k, v = as_floats(q=q, k=k, v=v)
    check_rank("q", q, "(N, T, H)", 3)
    check_kernel(config.head_dim, q, k, v)
    return _attention(config, q, k, v)


def _check_config(config: FlashAttentionConfig) -> None:
    if not isinstance(config, FlashAttentionConfig):
        raise TypeError(f"config must be a FlashAttentionConfig; it is {type(config).__name__}")


@functools.partial(jax.jit, static_argnums=0)
def _attention(config: FlashAttentionConfig, q: Array, k: Array, v: Array) -> Array:
    scale = jnp.full((1,), config.scale, jnp.promote_types(q.dtype, jnp.float32))
    mask = CausalMask().bind(Sizes()) if config.causal else None
    operands = Operands(q[None], k[None], v[None], Scores(scale, mask))
    out, _ = attention(operands, Static(config.block_sizes, Layout.HEADS_FIRST, batch=1))
    return out[0]
