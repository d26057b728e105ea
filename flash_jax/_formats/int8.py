"""The two products of a tile, of integers: u8 x s8 into s32, scaled afterwards.

With queries q = a (q8 - 128) and keys k = b k8 + mean,

    q . k = a b (q8 . k8 - 128 sum k8) + q . mean

Queries are unsigned because that is the product of bytes that x86 has an instruction for (VNNI:
four of unsigned by signed, summed into int32); the integers in brackets are exact. Every query and
every key has a scale of its own, which costs nothing here: scales enter where integers become
floats.

Probabilities are unsigned, too: round(255 p), with p = exp(s - m_t) relative to the row's largest
score m_t in tile t. Each is off by at most 1/510, and none by more than itself, so with tiles of n
keys, l_t the sum of p in tile t and w_t = exp(m_t - m), the output is off by at most

    max |v| sum_t w_t min(n / 510, l_t - 1) / sum_t w_t l_t

A key of probability 1 with many just below 1/510 around it comes near that. But rounding errors
fall on both sides: were they independent of the values, Hoeffding's inequality bounds the chance
that an output is off by more than 2/255 max |v| by 2 exp(-8 (sum_t w_t l_t)^2 / sum_t w_t^2 n),
typically 1e-30 in a row of 1,024 normal scores and tiles of 192. In bfloat16 each p is within
p / 256, so the output is within max |v| / 256 of that with exact probabilities, whatever they are;
values with a scale per row are rounded to bfloat16, too, and then it is twice that.

Zhang et al., SageAttention, 2024, section 4, https://arxiv.org/abs/2410.02367
Hoeffding, Probability inequalities, 1963, theorem 2, https://doi.org/10.1080/01621459.1963.10500830
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jax import Array, lax, vmap
from jax import numpy as jnp

from .._passes import online_softmax as online
from .._passes.exp import exp
from .._passes.operands import Operands, Quantization, key_columns, kv_tile, q_tile, query_rows
from .._passes.plan import Plan
from .._passes.products import Products
from .._tiles.axis import BlockSizes
from .._tiles.tile import QueryTile
from .._tiles.xla import apart, dot_u8_s8, rounded
from .floats import weigh_bfloat16, weigh_fused

ZERO_POINT = 128  # of the queries
MOST_SUMMED = 2**16  # products of bytes that an int32 holds the sum of
_LEVELS = np.float32(255)  # of the probabilities
_INTEGER_TO_MANTISSA = np.float32(2**23)


@dataclasses.dataclass(frozen=True)
class Int8:
    """Quantized operands; probabilities are rounded to uint8 or bfloat16, or stay float32."""

    probabilities: np.dtype

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        of_tile = _fused_products if fused else _int8_products
        return of_tile(self.probabilities, operands, plan, tile)


def _int8_products(
    probabilities: np.dtype, operands: Operands, plan: Plan, tile: QueryTile
) -> Products:
    assert operands.quantization is not None
    _, _, k_scale, k_zero, v_scale = operands.quantization
    q = apart(q_tile(plan, tile, operands.q, np.dtype(np.uint8)))
    q_scale, q_shift = _of_rows(operands.quantization, tile)
    pages = operands.pages

    def held(x: Array, j: Array) -> Array:
        return kv_tile(plan, tile, x, j, np.dtype(np.int8), pages)

    def scores(j: Array) -> Array:
        zero, scale = (key_columns(tile, x, j, pages)[:, None] for x in (k_zero, k_scale))
        integers = vmap(dot_u8_s8)(q, held(operands.k, j)) - zero
        # Rounded, they are also computed once only: XLA would fuse them into the maximum, and again
        # into the probabilities, at several times the cost.
        s = rounded(integers.astype(np.float32) * (scale * q_scale))
        return s if q_shift is None else s + q_shift

    def values(j: Array) -> Array:
        v = held(operands.v, j)
        if probabilities == np.uint8:
            return v
        return _scaled(v, v_scale, tile, j, pages).astype(probabilities)

    finish = functools.partial(_scaled_by_channel, v_scale, tile)
    products = Products(scores, values, online.dot, finish, floats=False)
    if probabilities == np.float32:
        return products
    products = products._replace(exp=functools.partial(exp, degree=4))  # far finer than 8 bits
    if probabilities == jnp.bfloat16:
        return products._replace(weigh=weigh_bfloat16)
    return products._replace(weigh=vmap(_weigh_uint8), absorb=online.absorb_apart)


def _fused_products(
    probabilities: np.dtype, operands: Operands, plan: Plan, tile: QueryTile
) -> Products:
    """The same for one kernel per tile, which multiplies the integers as bfloat16.

    Bytes are exact in it, and sums of their products in float32 up to 2^24. Probabilities are
    bfloat16 even where uint8 would do.
    """
    assert operands.quantization is not None
    _, _, k_scale, _, v_scale = operands.quantization
    bfloat16, pages = np.dtype(jnp.bfloat16), operands.pages
    q = q_tile(plan, tile, operands.q, np.dtype(np.int32)) - ZERO_POINT
    q = apart(q.astype(bfloat16))
    q_scale, q_shift = _of_rows(operands.quantization, tile)
    dtype = bfloat16 if probabilities == np.uint8 else probabilities

    def scores(j: Array) -> Array:
        k = kv_tile(plan, tile, operands.k, j, bfloat16, pages)
        integers = online.dot(q, k, -1, np.float32)
        s = integers * (key_columns(tile, k_scale, j, pages)[:, None] * q_scale)
        return s if q_shift is None else s + q_shift

    def values(j: Array) -> Array:
        v = kv_tile(plan, tile, operands.v, j, dtype, pages)
        return _scaled(v, v_scale, tile, j, pages).astype(dtype)

    finish = functools.partial(_scaled_by_channel, v_scale, tile)
    coarse = dtype == bfloat16
    weigh = weigh_fused if coarse else online.dot
    return Products(scores, values, weigh, finish, floats=False, coarse=coarse)


def _of_rows(quantization: Quantization, tile: QueryTile) -> tuple[Array, Array | None]:
    """Scales and shifts of the queries, (heads, rows, 1)."""
    scale, shift = quantization.q_scale, quantization.q_shift
    shift = None if shift is None else query_rows(tile, shift)[..., None]
    return query_rows(tile, scale)[..., None], shift


def _scaled(
    v: Array, v_scale: Array, tile: QueryTile, j: Array, pages: Array | None = None
) -> Array:
    """Values of key tile j times scales per row, in float32; those per channel come at the end."""
    if _by_channel(v_scale):
        return v
    return v.astype(np.float32) * key_columns(tile, v_scale[..., 0], j, pages)[..., None]


def _scaled_by_channel(v_scale: Array, tile: QueryTile, o: Array) -> Array:
    if not _by_channel(v_scale):
        return o
    return o * lax.dynamic_slice_in_dim(tile.of_instance(v_scale), tile.head, tile.heads)


def _by_channel(v_scale: Array) -> bool:
    """Whether all values of a head have the same scales. Those in pages have their own."""
    return v_scale.ndim == 4 and v_scale.shape[2] == 1


def summable(name: str, head_dim: int, blocks: BlockSizes) -> BlockSizes:
    """blocks with tiles of keys cut to what an int32 holds the sum of; checks the head size."""
    if head_dim > MOST_SUMMED:
        raise ValueError(f"{name} must have a head size of at most {MOST_SUMMED}; it is {head_dim}")
    return BlockSizes(blocks.q, min(blocks.kv, MOST_SUMMED))


def _weigh_uint8(p: Array, v: Array) -> Array:
    # The sum has the rounded integer in its lowest bits, at a fraction of a conversion's cost.
    bits = lax.bitcast_convert_type(p * _LEVELS + _INTEGER_TO_MANTISSA, np.int32)
    return dot_u8_s8(bits.astype(np.uint8), v, axis=0).astype(np.float32) / _LEVELS
