"""Attention of models: the options of a call become one mask and one rule for the scores."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from ._block_sizes import fastest_blocks
from ._dropout import bind_key
from ._machine import machine
from ._masks import ArrayMask, CausalMask, LengthMask, Mask, WindowMask, segments
from ._operands import Operands, Static
from ._primitives import attention
from ._scores import Scores
from ._shapes import (
    BlockSizes,
    Sizes,
    as_block_sizes,
    as_floats,
    bind_integers,
    bind_reals,
    bind_scores,
    check_array,
    check_bool,
    check_dropout,
    check_int32,
    check_positive,
    check_qkv,
    check_window,
)
from ._tiles import Layout


def flash_attention(
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
    block_sizes: tuple[int, int] | None = None,
) -> Array:
    """Computes ``softmax(scale * query @ key.T) @ value`` per head, in memory linear in T and S.

    A score is  soft_cap(scale * q . k) + alibi + bias,  then masked. All masking options apply
    together. Without the axis B, every array is without it: lengths and offsets are scalars.

    Args:
        query: (B, T, N, H) or (T, N, H), float32, bfloat16, float16, or float64 under x64.
        key: (B, S, K, H), dtype of query. Query head n reads key/value head ``n // (N // K)`` [2].
        value: (B, S, K, Hv), dtype of query.
        bias: float, broadcastable to (B, N, T, S); added to the scores. -inf masks.
        mask: bool, broadcastable to (B, N, T, S), True keeps the pair; or a ``Mask``. Tiles that it
            empties are skipped.
        scale: factor on the products; a number or a traced scalar; default ``1 / sqrt(H)``.
        is_causal: query t reads keys 0..t + query_offset. For T = 2, S = 4 and query_offset 0 the
            kept pairs are  1 0 0 0
                            1 1 0 0
        query_seq_lengths: int32 (B,): later queries are padding, and read no key.
        key_value_seq_lengths: int32 (B,): later keys are padding, and are not read.
        local_window_size: w or (left, right), >= 0 or None for an open side: query t reads keys
            t + query_offset - left .. t + query_offset + right.
        query_offset: int32, a scalar or (B,): position of query 0 among the keys. S - T aligns the
            causal diagonal bottom-right; the length of a cache is that of decoding.
        query_segment_ids: integers (B, T) or (T,): a query reads keys of its own segment.
        key_value_segment_ids: integers (B, S) or (S,).
        logits_soft_cap: c > 0: a product x becomes c * tanh(x / c).
        sinks: float (N,): one more logit per head, of value 0, in the denominator and in lse [3].
        alibi_slopes: float (N,): adds ``-slope * |t + query_offset - s|`` [4].
        dropout_rate: in [0, 1): each probability is dropped at this rate, after the statistics
            of the softmax, and the others divided by 1 - rate.
        dropout_rng: a PRNG key. Which probabilities are dropped depends on it and on the indices
            (batch element, head, t, s) alone.
        block_sizes: positions per tile, queries and keys; default: the fastest known here. Changes
            speed and rounding only; need not divide T or S.

    Returns:
        (B, T, N, Hv), dtype of query, summed in float32 (float64 for float64). A row that may read
        no key is zero (``jax.nn.dot_product_attention`` returns the mean of value there). What is
        masked changes nothing, NaN and inf included; a visible NaN shows.

    Raises:
        ValueError: shapes, dtypes or ranges disagree; the message names the argument.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: sizes are symbolic.

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
    return flash_attention_with_lse(
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
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        block_sizes=block_sizes,
    )[0]


def flash_attention_with_lse(
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
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Array, Array]:
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
    query, key, value = as_floats(query=query, key=key, value=value)
    arrays = {
        "bias": bias,
        "scale": scale,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "query_offset": query_offset,
        "query_segment_ids": query_segment_ids,
        "key_value_segment_ids": key_value_segment_ids,
        "logits_soft_cap": logits_soft_cap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
    }
    if query_offset is None:
        raise TypeError("query_offset must be an integer or an array of them; it is None")
    for name, x in arrays.items():
        check_array(name, x)
        check_int32(name, x)
    if not isinstance(mask, Mask):
        check_array("mask", mask)
    check_positive("logits_soft_cap", logits_soft_cap)
    static = Options(
        is_causal=check_bool("is_causal", is_causal),
        window=check_window("local_window_size", local_window_size),
        dropout_rate=check_dropout("dropout_rate", dropout_rate, "dropout_rng", dropout_rng),
        blocks=None if block_sizes is None else as_block_sizes(block_sizes),
    )
    return _attention(query, key, value, mask, arrays, dropout_rng, static)


class Options(NamedTuple):
    """The options that are compiled in."""

    is_causal: bool
    window: tuple[int | None, int | None] | None
    dropout_rate: float
    blocks: BlockSizes | None

    @property
    def reach(self) -> int | None:
        """How many keys a query may read at the most; None: no bound is known."""
        if self.window is None:
            return None
        left, right = self.window
        right = 0 if self.is_causal else right
        return None if left is None or right is None else left + right + 1


@functools.partial(jax.jit, static_argnames="options")
def _attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | Array | None,
    arrays: dict[str, Any],
    dropout_rng: Array | None,
    options: Options,
) -> tuple[Array, Array]:
    check_qkv(query, key, value)
    batched = query.ndim == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    sizes, acc = Sizes(B, N, T, S, batched), jnp.promote_types(query.dtype, jnp.float32)

    def real(name: str, axes: str) -> Array | None:
        x = arrays[name]
        return None if x is None else bind_reals(name, x, axes, sizes).astype(acc)

    scale, bias = real("scale", ""), arrays["bias"]
    scores = Scores(
        scale=jnp.full((1,), 1 / math.sqrt(H), acc) if scale is None else scale,
        mask=_one_mask(mask, arrays, options, sizes),
        soft_cap=real("logits_soft_cap", ""),
        alibi_slopes=real("alibi_slopes", "N"),
        offset=bind_integers("query_offset", arrays["query_offset"], "", sizes),
        bias=None if bias is None else bind_scores("bias", bias, "floats", jnp.floating, sizes),
    )
    blocks = options.blocks
    if blocks is None:
        masked = scores.mask is not None
        blocks = fastest_blocks(machine(), T, S, H, max(1, N // max(K, 1)), masked, options.reach)
    dropout_key = None
    if dropout_rng is not None and options.dropout_rate:
        dropout_key = bind_key(dropout_rng)
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    operands = Operands(query, key, value, scores, real("sinks", "N"), dropout_key)
    out, lse = attention(operands, Static(blocks, Layout.HEADS_LAST, B, options.dropout_rate))
    return (out, lse) if batched else (out[0], lse[0])


def _one_mask(
    mask: Mask | Array | None, arrays: dict[str, Any], options: Options, sizes: Sizes
) -> Mask | None:
    """The masking options as one bound mask."""

    def integers(name: str, axes: str) -> Array | None:
        x = arrays[name]
        return None if x is None else bind_integers(name, x, axes, sizes)

    masks: list[Mask] = []
    offset = bind_integers("query_offset", arrays["query_offset"], "", sizes)
    if options.is_causal:
        masks.append(CausalMask(offset))
    if options.window is not None:
        masks.append(WindowMask(*options.window, offset))
    lengths = [integers(name, "") for name in ("query_seq_lengths", "key_value_seq_lengths")]
    if lengths != [None, None]:
        masks.append(LengthMask(*lengths))
    q_ids = integers("query_segment_ids", "T")
    kv_ids = integers("key_value_segment_ids", "S")
    if (q_ids is None) != (kv_ids is None):
        given, missing = "query_segment_ids", "key_value_segment_ids"
        given, missing = (given, missing) if kv_ids is None else (missing, given)
        raise ValueError(f"{missing} must be given where {given} is")
    if q_ids is not None and kv_ids is not None:
        masks.append(segments(q_ids, kv_ids))
    if isinstance(mask, Mask):
        masks.append(mask.bind(sizes))
    elif mask is not None:
        masks.append(ArrayMask(mask).bind(sizes))
    return functools.reduce(operator.and_, masks) if masks else None
