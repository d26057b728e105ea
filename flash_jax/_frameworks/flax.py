"""The ``attention_fn`` for attention layers of Flax, NNX and Linen. Flax itself is not needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._masks.base import Mask
from .layers import attend


def nnx_attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Mask | ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Any = None,
    promote_dtype: Callable[..., tuple[Array, Array, Array]] | None = None,
    is_causal: bool = False,
    **options: Any,
) -> Array:
    """``flash_attention`` with the signature of ``flax.nnx.dot_product_attention``.

    ``nnx.MultiHeadAttention(..., attention_fn=flash_jax.nnx_attention_fn)`` keeps its parameters,
    caches and outputs, in memory linear in T and S. A mask may be an array, such as that of
    ``nnx.make_causal_mask``, but that is T x S itself: call the layer with ``is_causal=True``, or
    with ``mask=flash_jax.CausalMask()`` or another ``Mask``. With ``decode=True`` the layer
    combines the mask of its cache with arrays only. That mask is causal already: give the layer no
    mask, or an array.

    Args:
        query: (..., T, N, H), any number of batch axes.
        key: (..., S, K, H). Query head n reads key/value head ``n // (N // K)``.
        value: (..., S, K, Hv).
        bias: broadcastable to (..., N, T, S).
        mask: of any dtype, broadcastable to (..., N, T, S), 0 masks; or a ``Mask``, which sees the
            batch axes as one.
        broadcast_dropout: as ``flash_attention``: the same probabilities are dropped in every batch
            element and head.
        dropout_rng: as ``flash_attention``: other probabilities are dropped than Flax drops.
        dropout_rate: as ``flash_attention``.
        deterministic: no dropout.
        dtype: of the computation and the output; default: that of the inputs, promoted.
        precision: None, a ``lax.Precision``, its name, or a pair of these. On CPUs products of
            float32 have full precision with each of them; elsewhere only the default is offered.
        module: must be None, so ``sow_weights`` must be False: there are no weights to sow.
        promote_dtype: maps (query, key, value) and ``dtype=`` to three arrays of one dtype.
        is_causal: as ``flash_attention``.
        options: further options of ``flash_attention``, such as ``local_window_size``. A layer gets
            them by ``functools.partial(flash_jax.nnx_attention_fn, local_window_size=(255, 0))``.

    Returns:
        (..., T, N, Hv). A row that may read no key is zero (Flax: the mean of value).

    Raises:
        NotImplementedError: module or precision can't be honoured.
        ValueError, TypeError: as ``flash_attention``.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((3, 1, 4, 2, 8))
        >>> nnx_attention_fn(x, x, x, is_causal=True).shape
        (3, 1, 4, 2, 8)
    """
    if module is not None:
        raise NotImplementedError(
            "module must be None, sow_weights False: attention weights are never held as an array"
        )
    if deterministic:
        dropout_rate = 0.0
    _check_precision(precision)
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    elif dtype is not None:
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    return attend(
        query,
        key,
        value,
        bias,
        mask,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        is_causal=is_causal,
        **options,
    )


def linen_attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Mask | ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    **options: Any,
) -> Array:
    """``flash_attention`` with the signature of ``flax.linen.dot_product_attention``.

    ``nn.MultiHeadDotProductAttention(..., attention_fn=flash_jax.linen_attention_fn)`` keeps its
    parameters, caches and outputs, in memory linear in T and S. Call the layer with
    ``mask=flash_jax.CausalMask()``, not with a T x S array. With ``decode=True`` it takes no mask,
    or an array: see ``nnx_attention_fn``.

    Args:
        query, key, value, bias, mask: as ``nnx_attention_fn``. So are the others not named here.
        force_fp32_for_softmax: True or False: the softmax is always float32 at least.
        einsum_dot_general: must be None, as must the next two: there is no einsum to replace.
        qk_attn_weights_einsum: must be None.
        attn_weights_value_einsum: must be None.
        options: further options of ``flash_attention``, ``is_causal`` among them.

    Returns and Raises: as ``nnx_attention_fn``.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((3, 4, 2, 8))
        >>> linen_attention_fn(x, x, x).shape
        (3, 4, 2, 8)
    """
    einsums = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, einsum in einsums.items():
        if einsum is not None:
            raise NotImplementedError(f"{name} must be None; it is {einsum!r}")
    return nnx_attention_fn(
        query,
        key,
        value,
        bias,
        mask,
        broadcast_dropout,
        dropout_rng,
        dropout_rate,
        deterministic,
        dtype,
        precision,
        module,
        **options,
    )


def _check_precision(precision: Any) -> None:
    """Checks that products as they are have the precision asked for."""
    pair = precision if isinstance(precision, tuple | list) else (precision,)
    try:
        wanted = {lax.Precision(x) for x in pair}
    except ValueError:  # an algorithm, such as BF16_BF16_F32_X3
        raise NotImplementedError(
            f"precision must be a lax.Precision; it is {precision!r}"
        ) from None
    if jax.default_backend() != "cpu" and wanted != {lax.Precision.DEFAULT}:
        raise NotImplementedError(f"precision must be None except on CPUs; it is {precision!r}")
