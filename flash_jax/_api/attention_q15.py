"""Attention on fixed point: integers from input to output, and the same bits everywhere."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._checks.bind import Sizes
from .._checks.shapes import as_floats, as_int16, check_qkv
from .._formats.fixed_point import Multiplier
from .._formats.q15 import MOST_HEAD_DIM, MOST_KEYS, MOST_KEYS_OF_TILE, MOST_LOGIT, Q15, attend_q15
from .._machine.tile_rule import score_bytes
from .._masks.base import Mask
from .._passes.operands import Operands
from .._passes.plan import Plan
from .._passes.scores import Scores
from .._tiles.axis import BlockSizes
from .._tiles.layout import Layout
from .._tiles.symbolic import known
from .batch_axis import with_batch_axis
from .explicit_axes import model_axes, on_auto_axes
from .options import Arrays, Options, check_options, one_mask

_BLOCKS = BlockSizes(256, 512)
_LOG2_E = 1.4426950408889634  # written out: a logarithm may have other last bits elsewhere


def to_q15(x: ArrayLike) -> Array:
    """Floats as int16: 2^15 x, rounded to nearest, halves to even, and saturating.

    Args:
        x: float. What is below -1 becomes -1, what is above 1 - 2^-15 becomes that, and NaN 0.

    Raises:
        TypeError: x is no float array.
        NotImplementedError: it is differentiated. Fixed point has no derivative.

    Example:
        >>> import jax.numpy as jnp
        >>> to_q15(jnp.array([0.5, -1.0, 3.0])).tolist()
        [16384, -32768, 32767]
    """
    (x,) = as_floats(x=x)
    return _rounded(x)


@jax.custom_jvp
@jax.jit
def _rounded(x: Array) -> Array:
    wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
    scaled = jnp.round(jnp.clip(jnp.where(jnp.isnan(wide), 0, wide), -1, 1) * 2**15)
    return jnp.minimum(scaled, 2**15 - 1).astype(np.int16)


@_rounded.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "to_q15 has no derivative, nor has flash_attention_q15: fixed point is for inference; "
        "train with flash_attention"
    )


def from_q15(x: ArrayLike, dtype: DTypeLike = np.float32) -> Array:
    """int16 as the floats x / 2^15, exact in float32.

    Raises:
        TypeError: x is no int16 array.

    Example:
        >>> import jax.numpy as jnp
        >>> from_q15(jnp.array([16384, -32768], jnp.int16)).tolist()
        [0.5, -1.0]
    """
    (x,) = as_int16(x=x)
    return (x.astype(np.float32) * np.float32(2**-15)).astype(dtype)


def flash_attention_q15(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    mask: Mask | ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike = 0,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> Array:
    """Attention of int16 numbers x / 2^15: the same bits on every machine.

    Nothing depends on tiles, threads, devices, or versions of JAX: all is done on integers of 32
    bits, sums of integers are the same in every order, and this is what is computed. All sizes of
    shifts are known before. ``>> n`` is floor(x / 2^n).

    1. Logits of base 2 have 16 bits behind the point. With S = sum_h q_h k_h, exact, and
       scale 1.4426950408889634 = M 2^(e - 30), a product in float64, M an integer of 30 bits,
       rounded to even::

           x = (S + 128) >> 8      z = x M >> 30      y = (z + 2^(5 - e)) >> (6 - e)

       and y = z 2^(e - 6) where e >= 6, and 0 where e < -24.
    2. m = max y over the keys that the query reads, before anything is summed.
    3. With m - y = 65536 n + 256 i + r, r and i of 8 bits, and a table of
       t_i = round(2^30 2^(-i / 256)), i = 0..256::

           u = t_i - ((t_i - t_(i+1)) r >> 8)      p = (u + 2^(6 + n)) >> (7 + n)

       and p = 0 where n > 23. So p is 2^23 at the largest logit.
    4. l = sum p and o = sum p v are exact. Where l has c more than 31 bits, with c at most 8, the
       output is (abs(o) >> c) / (l >> c), with the sign of o, rounded to nearest, halves away from
       zero. It is 0 where the query reads no key.

    No sum overflows. S is made of three sums of products of bytes, each at most 2^24; x and y are
    at most 2^30. Sums of p v and of p are made of four such sums over up to 2^14 keys, each below
    2^31, and are added up in two integers; over 2^16 keys they are at most 2^54.

    Args:
        query: (B, T, N, H) or (T, N, H), int16.
        key: (B, S, K, H), int16. Query head n reads key/value head ``n // (N // K)``.
        value: (B, S, K, Hv), int16.
        mask: as in ``flash_attention``.
        scale: a number, known at trace time: factor on q . k; default ``1 / sqrt(H)``. To attend to
            a * query and b * key, multiply it by a * b.
        is_causal: as in ``flash_attention``, and so are the other options.
        block_sizes: queries and keys per tile. They change speed only.

    Returns:
        (B, T, N, Hv), int16. Where a query reads n keys, with probabilities that sum up to l >= 1
        relative to the largest, and scale is at most 1, the output is within::

            2^-16 + (2^-16 + 2^-23 n / l) max |v|

        of attention in real numbers to the numbers that the integers stand for: half a unit of the
        output, as much for logits and table, and half a unit for each p. So it is off by at most
        one unit and a bit up to some thousand keys, however peaked attention is. Of larger scales
        the part of the logits is up to (1 + scale / 8) 2^-16.

    Raises:
        ValueError: shapes or ranges disagree, H > 256, S > 65536, or scale * H > 11355.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: another axis than B is symbolic.

    Example:
        >>> import jax.numpy as jnp
        >>> x = to_q15(jnp.linspace(-0.9, 0.9, 64).reshape(1, 4, 2, 8))
        >>> from_q15(flash_attention_q15(x, x, x, is_causal=True)).shape
        (1, 4, 2, 8)
    """
    query, key, value = as_int16(query=query, key=key, value=value)
    arrays = Arrays(
        mask=mask,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
    ).checked()
    check_qkv(query, key, value)
    H, S = query.shape[-1], key.shape[-3]
    if H > MOST_HEAD_DIM:
        raise ValueError(f"query must have a head size of at most {MOST_HEAD_DIM}; it is {H}")
    if not (known(S) and known(query.shape[-3])):
        raise NotImplementedError(
            f"query and key may be symbolic in B only; their shapes are {query.shape}, {key.shape}"
        )
    if S > MOST_KEYS:
        raise ValueError(f"key must have at most {MOST_KEYS} positions; it has {S}")
    options = check_options(query, is_causal, local_window_size, block_sizes)
    q15 = Q15(Multiplier.of(_of_base_2(scale, H)))
    return _attention(query, key, value, arrays, options, q15)


def _of_base_2(scale: Any, H: int) -> float:
    """scale * log2(e), checked."""
    if scale is None:
        scale = 1 / math.sqrt(H)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number, known at trace time; it is {scale!r}")
    scale = float(scale)
    most = (MOST_LOGIT - 1) / H / _LOG2_E
    if not 0 < scale <= most:
        raise ValueError(
            f"scale must be > 0, and at most {most:.6g} for heads of {H}; it is {scale}"
        )
    return scale * _LOG2_E


@functools.partial(jax.jit, static_argnames=("options", "q15"))
def _attention(
    query: Array, key: Array, value: Array, arrays: Arrays, options: Options, q15: Q15
) -> Array:
    axes, (result, _) = model_axes(query)
    attend = functools.partial(with_batch_axis, functools.partial(_attend, options, q15))
    return on_auto_axes(attend, axes, result, query, key, value, arrays)


def _attend(
    options: Options, q15: Q15, query: Array, key: Array, value: Array, arrays: Arrays
) -> Array:
    (B, T, N, _), S = query.shape, key.shape[1]
    sizes = Sizes(B, N, T, S, options.batched)
    mask = one_mask(arrays.bound(sizes, np.dtype(np.float32)), options)
    blocks = options.blocks or _BLOCKS
    plan = Plan(
        blocks=BlockSizes(blocks.q, min(blocks.kv, MOST_KEYS_OF_TILE)),
        layout=Layout.HEADS_LAST,
        kv_layout=Layout.HEADS_LAST,
        elements=B,
        dtype=np.dtype(np.int16),
        format=q15,
        step_scores=score_bytes(options.machine) // 4,
    )
    operands = Operands(query, key, value, Scores(jnp.ones((1,), np.int32), mask))
    return attend_q15(operands, plan)
