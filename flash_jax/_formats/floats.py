"""The two products of a tile, of floats: scores q k^T, and values weighed by probabilities.

In float32, or float64 of float64. Where the processor multiplies bfloat16, bfloat16 inputs stay
what they are: their products are exact in float32, and probabilities are rounded to them, as in the
plain formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._checks.shapes import accumulator
from .._machine.processor import machine
from .._passes import online_softmax as online
from .._passes.exp import exp
from .._passes.operands import Operands, Static, kv_tile, q_tile
from .._tiles.tile import QueryTile
from .._tiles.xla import rounded


class Products(NamedTuple):
    """What the scan over the key tiles of one query tile multiplies."""

    scores: Callable[[Array], Array]  # j -> scale * q . k, (heads, rows, block_kv)
    values: Callable[[Array], Array]  # j -> v (heads, block_kv, Hv), or as weigh takes it
    weigh: Callable[[Array, Array], Array]  # p (heads, rows, block_kv), v -> p v (heads, rows, Hv)
    finish: Callable[[Array], Array]  # sums of p v (heads, rows, Hv) -> in the unit of the values
    absorb: Callable[..., online.State] = online.absorb  # (state, s, v, weigh, exp) -> state
    exp: Callable[[Array], Array] = exp


def float_products(operands: Operands, static: Static, tile: QueryTile) -> Products:
    """The products of floats."""
    if product_dtype(operands) == jnp.bfloat16:
        return _bfloat16_products(operands, static, tile)
    acc = accumulator(static.dtype)
    q = operands.scores.scaled(tile, q_tile(static, tile, operands.q, acc))
    return Products(
        scores=lambda j: operands.scores.products(q, kv_tile(static, tile, operands.k, j, acc)),
        values=lambda j: kv_tile(static, tile, operands.v, j, acc),
        weigh=online.dot,
        finish=lambda o: o,
    )


def product_dtype(operands: Operands) -> np.dtype:
    """What queries and keys are multiplied in."""
    if operands.q.dtype == jnp.bfloat16 and machine().bfloat16:
        return jnp.dtype(jnp.bfloat16)
    return accumulator(operands.q.dtype)


def _bfloat16_products(operands: Operands, static: Static, tile: QueryTile) -> Products:
    dtype = jnp.dtype(jnp.bfloat16)
    q, scale = q_tile(static, tile, operands.q, dtype), tile.of_element(operands.scores.scale)

    def scores(j: Array) -> Array:
        k = kv_tile(static, tile, operands.k, j, dtype)
        # Scaled afterwards: a scaled query would have to be rounded.
        return rounded(online.dot(q, k, -1, np.float32) * scale)

    return Products(
        scores=scores,
        values=lambda j: kv_tile(static, tile, operands.v, j, dtype),
        weigh=weigh_bfloat16,
        finish=lambda o: o,
    )


def weigh_bfloat16(p: Array, v: Array) -> Array:
    """Probabilities p (..., M, K), rounded to bfloat16, times bfloat16 v (..., K, N) in float32."""
    # Rounded to nearest by integers, at a fraction of a conversion's cost.
    bits = lax.bitcast_convert_type(p, np.uint32) + np.uint32(0x8000)
    p = lax.bitcast_convert_type((bits >> np.uint32(16)).astype(np.uint16), jnp.bfloat16)
    return online.dot(p, v, dtype=np.float32)
