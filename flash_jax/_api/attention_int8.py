"""Attention as models call it, in 8 bits: floats in and out, quantized inside."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._checks.numbers import check_probability_dtype
from .._checks.shapes import as_floats, check_qkv
from .._formats.int8 import summable
from .._formats.quantized import QuantizedArray, check_quantized, dequantize
from .._formats.smoothing import shift, to_floats, to_integers, to_operands
from .._formats.straight_through import straight_through
from .._masks.base import Mask
from .._passes.operands import Operands
from .._passes.primitives import attention
from .._tiles.layout import Layout
from .attention import attention_of_floats
from .batch_axis import with_batch_axis
from .explicit_axes import model_axes, on_auto_axes
from .options import Arrays, Options, bind_options, check_options
from .part import PartOf
from .plan import plan_int8
from .signature import same_arguments


def attention_int8_arguments(
    query: ArrayLike,
    key: ArrayLike | QuantizedArray,
    value: ArrayLike | QuantizedArray,
    bias: ArrayLike | None = None,
    mask: Mask | ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike = 0,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    probability_dtype: DTypeLike = np.uint8,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Array, Array | QuantizedArray, Array | QuantizedArray, Arrays, Options]:
    """The arguments of attention in int8, checked as far as no shapes are needed."""
    query, key, value = _as_inputs(query, key, value)
    arrays = Arrays(
        bias=bias,
        mask=mask,
        scale=scale,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    ).checked()
    options = check_options(query, is_causal, local_window_size, block_sizes)
    probabilities = check_probability_dtype("probability_dtype", probability_dtype)
    return query, key, value, arrays, options._replace(probabilities=probabilities)


@same_arguments(attention_int8_arguments)
def flash_attention_int8_with_lse(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """``flash_attention_int8``, and the log-sum-exp of its scores.

    Args and Raises: as ``flash_attention_int8``.

    Returns:
        The output, and lse (B, N, T), natural log, float32. It is that of the scores with the mean
        of the keys in them.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> out, lse = flash_attention_int8_with_lse(x, x, x)
        >>> lse.shape
        (1, 2, 4)
    """
    out, lse = _attention(*attention_int8_arguments(*args, **kwargs))
    assert lse is not None
    return out, lse


@same_arguments(attention_int8_arguments)
def flash_attention_int8(*args: Any, **kwargs: Any) -> Array:
    """``flash_attention`` with both products in 8 bits: faster, and off by about 1.5 %.

    Queries and keys are quantized per row, after the mean over keys is taken out of the keys [1].
    Values are quantized per channel. Keys and values that no query may read touch neither scales
    nor mean. Every visible one contributes: with causal attention later tokens can change earlier
    outputs by rounding, and one that is far larger than the rest costs the others precision. Keys
    and values may come quantized, as a cache holds them.

    Arguments that are not named below are those of ``flash_attention``. There is no dropout.

    Args:
        query: (B, T, N, H) or (T, N, H), float32, bfloat16 or float16.
        key: (B, S, K, H), dtype of query; or a ``QuantizedArray`` whose scales are constant along H
            (per tensor, head, row or block of rows) or along S (per channel). Quantized keys are
            used as they are: take out what shifts every key alike before quantizing.
        value: (B, S, K, Hv), as key. With uint8 probabilities its scales must be constant along S.
        probability_dtype: what probabilities are rounded to before they are multiplied by the
            values. uint8, relative to the row's largest in each tile, is the fastest. bfloat16 is
            within 2/255 of ``max |v|`` for every input. float32 is exact.
            ``flash_jax._formats.int8`` derives the bounds. Where the processor multiplies bfloat16,
            jaxlib 0.11 and later takes bfloat16 for uint8, too, in all but small calls.
        block_sizes: as ``flash_attention``. Longer tiles of keys make uint8 probabilities coarser.

    Returns:
        (B, T, N, Hv), dtype of query. A row that may read no key is zero. A NaN or an infinity in a
        query, or in a visible key or value, makes lse and all channels NaN in the rows that read
        it.

        Gradients are straight-through: those of ``flash_attention`` at the numbers that the
        integers stand for, in linear memory. Quantized keys and values have them in their scales.

    Raises:
        ValueError: shapes, dtypes or ranges disagree; the message names the argument.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: heads or their sizes are symbolic. B, T and S may be.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_jax import quantize
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> flash_attention_int8(x, x, x, is_causal=True).shape
        (1, 4, 2, 8)
        >>> key = quantize(x, (1, 2, 1, None))  # a scale per two rows of a head
        >>> flash_attention_int8(x, key, quantize(x, (1, None, 1, 1))).shape
        (1, 4, 2, 8)

    References:
        [1] Zhang et al., SageAttention, 2024, section 4, https://arxiv.org/abs/2410.02367
        [2] Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
    """
    *arrays, options = attention_int8_arguments(*args, **kwargs)
    return _attention(*arrays, options._replace(lse=False))[0]


def _as_inputs(
    query: Any, key: Any, value: Any
) -> tuple[Array, Array | QuantizedArray, Array | QuantizedArray]:
    """The three as arrays: floats of one dtype, and keys and values that are quantized already."""
    inputs = {"query": query, "key": key, "value": value}
    quantized = {
        name: check_quantized(name, x)
        for name, x in inputs.items()
        if name != "query" and isinstance(x, QuantizedArray)
    }
    floats = {name: x for name, x in inputs.items() if name not in quantized}
    first, *others = as_floats(**floats)
    if first.dtype == np.float64:
        raise TypeError("query must be float32, bfloat16 or float16; its dtype is float64")
    both = dict(zip(list(floats)[1:], others, strict=True)) | quantized
    return first, both["key"], both["value"]


@functools.partial(jax.jit, static_argnames="options")
def _attention(
    query: Array,
    key: Array | QuantizedArray,
    value: Array | QuantizedArray,
    arrays: Arrays,
    options: Options,
) -> tuple[Array, Array | None]:
    check_qkv(query, key, value)
    _check_scales("key", key)
    _check_scales("value", value, probabilities=options.probabilities)
    in_integers = functools.partial(straight_through, (options,), _in_integers, _at_integers)
    attend = functools.partial(with_batch_axis, in_integers)
    return on_auto_axes(attend, *model_axes(query), query, key, value, arrays)


def _check_scales(name: str, x: Any, probabilities: np.dtype | None = None) -> None:
    """Checks that quantized keys or values vary their scales along one axis that can be used."""
    if not isinstance(x, QuantizedArray):
        return
    along_S, along_H = x.scales.shape[-3] > 1, x.scales.shape[-1] > 1
    if along_S and along_H:
        raise ValueError(
            f"{name}.scales must be constant along S or along H; their shape is {x.scales.shape}"
        )
    if along_S and probabilities == np.uint8:
        raise ValueError(
            f"{name}.scales must be constant along S with probability_dtype uint8; their shape is "
            f"{x.scales.shape}"
        )


def _in_integers(
    options: Options,
    query: Array,
    key: Array | QuantizedArray,
    value: Array | QuantizedArray,
    arrays: Arrays,
) -> tuple[Array, Array | None]:
    bound = bind_options(arrays, options, query, key)
    scores, blocks = bound.scores, summable("query", query.shape[-1], bound.blocks)
    integers = to_integers(query, key, value, scores.read_keys(query.shape[1], key.shape[1]))
    q, k, v, quantization = to_operands(integers, scores.scale)
    later = shift(query, integers, scores.scale)
    if scores.soft_cap is not None or bound.sinks is not None:
        quantization, later = quantization._replace(q_shift=later), None
    operands = Operands(q, k, v, scores, bound.sinks, quantization=quantization)
    assert options.probabilities is not None
    plan = plan_int8(
        q,
        key.shape[1],
        blocks,
        Layout.HEADS_LAST,
        query.dtype,
        options.machine,
        options.probabilities,
        bound.kernel,
        options.lse,
        PartOf(options.machine, q.dtype, q.shape[-1], bound.given, bound.problem),
    )
    out, lse = attention(operands, plan)
    if later is not None and lse is not None:
        # A row that reads no key keeps -inf, where later may be NaN.
        lse = jnp.where(jnp.isneginf(lse), lse, lse + later)
    return out, lse


def _at_integers(
    options: Options,
    query: Array,
    key: Array | QuantizedArray,
    value: Array | QuantizedArray,
    arrays: Arrays,
) -> tuple[Array, Array | None]:
    """Attention of the floats that the integers stand for, with derivatives straight through."""
    scores = bind_options(arrays, options, query, key).scores
    read = scores.read_keys(query.shape[1], key.shape[1])
    still = lax.stop_gradient((query, key, value))
    exact = to_floats(to_integers(still[0], still[1], still[2], read))

    def through(x: Array | QuantizedArray, exact: Array) -> Array:
        x = dequantize(x) if isinstance(x, QuantizedArray) else x.astype(np.float32)
        return x + lax.stop_gradient(exact - x)

    q, k, v = map(through, (query, key, value), exact)
    options = options._replace(blocks=None, probabilities=None)  # the tiles of floats
    out, lse = attention_of_floats(q, k, v, arrays, options)
    return out.astype(query.dtype), lse
