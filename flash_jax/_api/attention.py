"""Attention as models call it, with positions before heads, on floats."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from .._checks.numbers import check_bool, check_dropout
from .._checks.shapes import as_floats, check_qkv
from .._masks.base import Mask
from .._passes.operands import Operands
from .._passes.primitives import attention
from .._tiles.heads_first import heads_first
from .._tiles.layout import Layout
from .batch_axis import with_batch_axis
from .explicit_axes import model_axes, on_auto_axes
from .options import Arrays, Options, bind_options, check_options
from .part import PartOf
from .plan import plan_floats
from .signature import same_arguments


def attention_arguments(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
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
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    broadcast_dropout: bool = False,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Array, Array, Array, Arrays, Options]:
    """The arguments of attention, checked as far as no shapes are needed."""
    query, key, value = as_floats(query=query, key=key, value=value)
    rate = check_dropout("dropout_rate", dropout_rate, "dropout_rng", dropout_rng)
    alike = check_bool("broadcast_dropout", broadcast_dropout) and rate > 0
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
        dropout_rng=dropout_rng,
    ).checked()
    options = check_options(query, is_causal, local_window_size, block_sizes)
    options = options._replace(dropout_rate=rate, broadcast_dropout=alike)
    return query, key, value, arrays, options


@same_arguments(attention_arguments)
def flash_attention_with_lse(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """``flash_attention``, and the log-sum-exp of its scores.

    Args and Raises: as ``flash_attention``.

    Returns:
        The output, and lse (B, N, T), natural log, float32 (float64 for float64). A row that may
        read no key has lse -inf, or its sink. ``merge_attention`` joins results over disjoint keys.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> out, lse = flash_attention_with_lse(x, x, x)
        >>> lse.shape
        (1, 2, 4)
    """
    out, lse = attention_of_floats(*attention_arguments(*args, **kwargs))
    assert lse is not None
    return out, lse


@same_arguments(attention_arguments)
def flash_attention(*args: Any, **kwargs: Any) -> Array:
    """Computes ``softmax(scale * query @ key.T) @ value`` per head, in memory linear in T and S.

    A score is  soft_cap(scale * q . k) + alibi + bias,  then masked. All masking options apply
    together. If query has no axis B, no array has it: lengths and offsets are scalars. Options that
    are arrays may be lists.

    Args:
        query: (B, T, N, H) or (T, N, H), float32, bfloat16, float16, or float64 under x64.
        key: (B, S, K, H), dtype of query. Query head n reads key/value head ``n // (N // K)`` [2].
        value: (B, S, K, Hv), dtype of query.
        bias: float, broadcastable to (B, N, T, S); added to the scores. -inf masks.
        mask: bool, broadcastable to (B, N, T, S), True keeps the pair; or a ``Mask``. Tiles that it
            empties are skipped.
        scale: factor on the products, finite; a scalar or (B,); default ``1 / sqrt(H)``.
        is_causal: query t reads keys 0..t + query_offset. For T = 2, S = 4 and query_offset 0 the
            kept pairs are::

                1 0 0 0
                1 1 0 0
        query_seq_lengths: int32 (B,): later queries are padding, and read no key.
        key_value_seq_lengths: int32 (B,): later keys are padding, and are not read.
        local_window_size: w or (left, right), >= 0 or None for an open side: query t reads keys
            t + query_offset - left .. t + query_offset + right.
        query_offset: int32, a scalar or (B,): position of query 0 among the keys. S - T aligns the
            causal diagonal bottom-right. In decoding it is the length of the cache.
        query_segment_ids: integers (B, T) or (T,): a query reads keys of its own segment.
        key_value_segment_ids: integers (B, S) or (S,).
        logits_soft_cap: c > 0, a scalar or (B,): a product x becomes c * tanh(x / c).
        sinks: float (N,) or (B, N): one more logit per head, of value 0, in the denominator and in
            lse [3].
        alibi_slopes: float (N,) or (B, N): adds ``-slope * |t + query_offset - s|`` [4].
        dropout_rate: in [0, 1): each probability is dropped at this rate, and the others are
            divided by 1 - rate. The sum that normalises them, and lse, are those without dropout.
        dropout_rng: a PRNG key. Which probabilities are dropped depends on it and on the indices
            (batch element, head, t, s) only.
        broadcast_dropout: every batch element and head drops the same probabilities. Which they are
            depends on dropout_rng and (t, s) only.
        block_sizes: queries and keys per tile; default: the fastest known here. They change speed
            and rounding only, and need not divide T or S.

    Returns:
        (B, T, N, Hv), dtype of query, summed in float32 (float64 for float64). A row that may read
        no key is zero (``jax.nn.dot_product_attention`` returns the mean of value there). What is
        masked changes nothing, NaN and inf included. A visible NaN reaches the output.

    Raises:
        ValueError: shapes, dtypes or ranges disagree; the message names the argument.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: heads or their sizes are symbolic. B, T and S may be.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> flash_attention(x, x, x, is_causal=True).shape
        (1, 4, 2, 8)

    References:
        [1] Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
        [2] Ainslie et al., GQA, 2023, https://arxiv.org/abs/2305.13245
        [3] Xiao et al., Attention sinks, 2023, section 3, https://arxiv.org/abs/2309.17453
        [4] Press et al., ALiBi, 2021, section 3, https://arxiv.org/abs/2108.12409
    """
    *arrays, options = attention_arguments(*args, **kwargs)
    return attention_of_floats(*arrays, options._replace(lse=False))[0]


@functools.partial(jax.jit, static_argnames="options")
def attention_of_floats(
    query: Array, key: Array, value: Array, arrays: Arrays, options: Options
) -> tuple[Array, Array | None]:
    """The output, and lse where it is asked for; compiled once per shapes and ``options``."""
    check_qkv(query, key, value)
    attend = functools.partial(_in_batch, options)
    return on_auto_axes(attend, *model_axes(query), query, key, value, arrays)


def _in_batch(
    options: Options, query: Array, key: Array, value: Array, arrays: Arrays
) -> tuple[Array, Array | None]:
    return with_batch_axis(_attend, query, key, value, arrays, options)


def _attend(
    query: Array, key: Array, value: Array, arrays: Arrays, options: Options
) -> tuple[Array, Array | None]:
    bound = bind_options(arrays, options, query, key)
    plan = plan_floats(
        query,
        key,
        bound.blocks,
        Layout.HEADS_LAST,
        options.machine,
        options.dropout_rate,
        options.broadcast_dropout,
        bound.kernel,
        options.lse,
        PartOf(options.machine, query.dtype, query.shape[-1], bound.given, bound.problem),
    )
    if plan.kv_layout is Layout.HEADS_FIRST:
        key, value = heads_first(key), heads_first(value)
    operands = Operands(query, key, value, bound.scores, bound.sinks, bound.dropout_key)
    return attention(operands, plan)
