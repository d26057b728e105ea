"""The kernels: attention of one head and of many, heads first, with their tiles in a config.

Each takes floats, or int8 with one scale per array.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._checks.bind import Sizes
from .._checks.numbers import as_scale, check_probability_dtype
from .._checks.shapes import accumulator, as_floats, as_int8, check_kernel, check_rank
from .._formats.int8 import summable
from .._formats.smoothing import unsigned, zero_products
from .._formats.straight_through import straight_through
from .._machine.processor import Machine, machine
from .._masks.positions import CausalMask
from .._passes.operands import Operands, Quantization
from .._passes.primitives import attention
from .._passes.scores import Scores
from .._tiles.layout import Layout
from .config import FlashAttentionConfig
from .explicit_axes import on_auto_axes
from .part import PartOf
from .plan import plan_floats, plan_int8


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
    return _attention(config, machine(), q[None], k[None], v[None])[0]


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
    return _attention(config, machine(), q, k, v)


def flash_attention_forward_i8(
    config: FlashAttentionConfig,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    q_scale: ArrayLike,
    k_scale: ArrayLike,
    v_scale: ArrayLike,
    *,
    probability_dtype: DTypeLike = np.uint8,
) -> Array:
    """``flash_attention_forward`` of one head in int8, with one scale per array.

    Args:
        config: tile sizes, head size, causal flag and scale.
        q: (T, H) int8, which stands for ``q * q_scale``; H is ``config.head_dim``.
        k: (S, H) int8.
        v: (S, Hv) int8.
        q_scale: >= 0 and finite, a number or a traced scalar. ``quantize`` finds it.
        k_scale: alike, of k.
        v_scale: alike, of v.
        probability_dtype: as ``flash_attention_int8``.

    Returns:
        (T, Hv) float32. Scores are summed in int32, and so are values with uint8 probabilities. A
        row that may read no key is zero. The derivatives in the scales are those of
        ``flash_attention_forward``.

    Raises:
        ValueError: shapes disagree with each other or with config, or a scale is out of range; the
            message names the argument.
        TypeError: config is no FlashAttentionConfig, or an argument is of the wrong kind.

    Example:
        >>> import jax.numpy as jnp
        >>> config = FlashAttentionConfig.for_head_dim(8, causal=True)
        >>> x = jnp.full((5, 8), 64, jnp.int8)
        >>> flash_attention_forward_i8(config, x, x, x, 0.1, 0.1, 0.125)[0, 0]
        Array(8., dtype=float32)

    References:
        [1] Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
        [2] Zhang et al., SageAttention, 2024, section 4, https://arxiv.org/abs/2410.02367
    """
    _check_config(config)
    q, k, v = as_int8(q=q, k=k, v=v)
    check_rank("q", q, "(T, H)", 2)
    check_kernel(config.head_dim, q, k, v)
    scales = _as_scales(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    dtype = check_probability_dtype("probability_dtype", probability_dtype)
    return _attention_int8(config, machine(), dtype, q[None], k[None], v[None], *scales)[0]


def flash_mha_i8(
    config: FlashAttentionConfig,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    q_scale: ArrayLike,
    k_scale: ArrayLike,
    v_scale: ArrayLike,
    *,
    probability_dtype: DTypeLike = np.uint8,
) -> Array:
    """``flash_mha`` in int8, with one scale per array.

    Args:
        config: tile sizes, head size, causal flag and scale; the same for every head.
        q: (N, T, H) int8, which stands for ``q * q_scale``; H is ``config.head_dim``.
        k: (K, S, H) int8. Query head n reads key/value head ``n // (N // K)``.
        v: (K, S, Hv) int8.
        q_scale, k_scale, v_scale, probability_dtype: as ``flash_attention_forward_i8``.

    Returns:
        (N, T, Hv) float32, as ``flash_attention_forward_i8``.

    Raises:
        ValueError, TypeError: as ``flash_attention_forward_i8``.

    Example:
        >>> import jax.numpy as jnp
        >>> config = FlashAttentionConfig.auto(8, seq_len_q=5, seq_len_kv=7)
        >>> q, kv = jnp.ones((4, 5, 8), jnp.int8), jnp.ones((2, 7, 8), jnp.int8)
        >>> flash_mha_i8(config, q, kv, kv, 0.1, 0.1, 0.1).shape
        (4, 5, 8)
    """
    _check_config(config)
    q, k, v = as_int8(q=q, k=k, v=v)
    check_rank("q", q, "(N, T, H)", 3)
    check_kernel(config.head_dim, q, k, v)
    scales = _as_scales(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    dtype = check_probability_dtype("probability_dtype", probability_dtype)
    return _attention_int8(config, machine(), dtype, q, k, v, *scales)


def _check_config(config: FlashAttentionConfig) -> None:
    if not isinstance(config, FlashAttentionConfig):
        raise TypeError(f"config must be a FlashAttentionConfig; it is {type(config).__name__}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention(config: FlashAttentionConfig, here: Machine, q: Array, k: Array, v: Array) -> Array:
    return on_auto_axes(functools.partial(_attend, config, here), "NT.", "NT.", q, k, v)


def _attend(config: FlashAttentionConfig, here: Machine, q: Array, k: Array, v: Array) -> Array:
    operands = Operands(q[None], k[None], v[None], _scores(config, q.dtype))
    blocks = config.block_sizes
    plan = plan_floats(
        operands.q,
        operands.k,
        blocks,
        Layout.HEADS_FIRST,
        here,
        kernel=blocks,
        lse=False,
        part=PartOf(here, q.dtype, q.shape[-1], blocks),
    )
    out, _ = attention(operands, plan)
    return out[0]


def _scores(config: FlashAttentionConfig, dtype: DTypeLike) -> Scores:
    scale = jnp.full((1,), config.scale, accumulator(dtype))
    return Scores(scale, CausalMask().bind(Sizes()) if config.causal else None)


def _as_scales(**scales: ArrayLike) -> list[ArrayLike]:
    return [as_scale(name, x) for name, x in scales.items()]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attention_int8(
    config: FlashAttentionConfig, here: Machine, probabilities: np.dtype, *arrays: Array
) -> Array:
    *integers, q_scale, k_scale, v_scale = arrays
    scales = (jnp.asarray(x).astype(np.float32) for x in (q_scale, k_scale, v_scale))
    static = config, here, probabilities
    attend = functools.partial(straight_through, static, _in_integers, _at_integers)
    return on_auto_axes(attend, "NT.", "NT.", *integers, *scales)


def _in_integers(
    config: FlashAttentionConfig,
    here: Machine,
    probabilities: np.dtype,
    q: Array,
    k: Array,
    v: Array,
    q_scale: Array,
    k_scale: Array,
    v_scale: Array,
) -> Array:
    scores = _scores(config, np.float32)
    quantization = Quantization(
        q_scale=jnp.broadcast_to(q_scale * scores.scale, (1, *q.shape[:2])),
        q_shift=None,
        k_scale=jnp.broadcast_to(k_scale, (1, *k.shape[:2])),
        k_zero=zero_products(k)[None],
        v_scale=jnp.broadcast_to(v_scale, (1, k.shape[0], 1, 1)),
    )
    operands = Operands(unsigned(q)[None], k[None], v[None], scores, quantization=quantization)
    blocks = summable("q", q.shape[-1], config.block_sizes)
    dtype = np.dtype(np.float32)
    plan = plan_int8(
        operands.q,
        k.shape[1],
        blocks,
        Layout.HEADS_FIRST,
        dtype,
        here,
        probabilities,
        config.block_sizes,
        lse=False,
        part=PartOf(here, operands.q.dtype, q.shape[-1], config.block_sizes),
    )
    return attention(operands, plan)[0][0]


def _at_integers(
    config: FlashAttentionConfig,
    here: Machine,
    _: np.dtype,
    q: Array,
    k: Array,
    v: Array,
    *scales: Array,
) -> Array:
    floats = (x.astype(np.float32) * scale for x, scale in zip((q, k, v), scales, strict=True))
    return _attention(config, here, *floats)
