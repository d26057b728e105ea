"""The two products of a tile, of floats: scores q k^T, and values weighed by probabilities.

In float32, or float64 of float64. Where the processor multiplies bfloat16, bfloat16 inputs stay
what they are: their products are exact in float32, and probabilities are rounded to them, as in the
plain formula.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._passes import online_softmax as online
from .._passes.operands import Dimensions, Operands, kv_tile, q_tile
from .._passes.plan import Plan
from .._passes.products import Products
from .._tiles.tile import QueryTile
from .._tiles.xla import apart, rounded


@dataclasses.dataclass(frozen=True)
class Floats:
    """Floats, multiplied in a dtype: that of the sums, or bfloat16."""

    dtype: np.dtype

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        if self.dtype == jnp.bfloat16:
            return _bfloat16_products(operands, plan, tile, fused)
        acc = Dimensions.of(operands, plan).acc
        q = operands.scores.scaled(tile, q_tile(plan, tile, operands.q, acc))
        held = lambda x, j: kv_tile(plan, tile, x, j, acc, operands.pages)  # noqa: E731
        return Products(
            scores=lambda j: operands.scores.products(q, held(operands.k, j)),
            values=lambda j: held(operands.v, j),
            weigh=online.dot,
            finish=lambda o: o,
        )


def _bfloat16_products(operands: Operands, plan: Plan, tile: QueryTile, fused: bool) -> Products:
    dtype = jnp.dtype(jnp.bfloat16)
    # Next to a transposition XLA multiplies in float32 (0.10, 0.12).
    q = apart(q_tile(plan, tile, operands.q, dtype))
    scale = tile.of_instance(operands.scores.scale)

    def held(x: Array, j: Array) -> Array:
        return apart(kv_tile(plan, tile, x, j, dtype, operands.pages))

    def scores(j: Array) -> Array:
        # Scaled afterwards: a scaled query would have to be rounded.
        s = online.dot(q, held(operands.k, j), -1, np.float32) * scale
        return s if fused else rounded(s)

    return Products(
        scores=scores,
        values=lambda j: held(operands.v, j),
        weigh=weigh_fused if fused else weigh_bfloat16,
        finish=lambda o: o,
        coarse=True,
    )


def weigh_fused(p: Array, v: Array) -> Array:
    return online.dot(p.astype(jnp.bfloat16), v, dtype=np.float32)


def weigh_bfloat16(p: Array, v: Array) -> Array:
    """Probabilities p (..., M, K), rounded to bfloat16, times bfloat16 v (..., K, N) in float32."""
    # Rounded to nearest by integers, at a fraction of a conversion's cost.
    bits = lax.bitcast_convert_type(p, np.uint32) + np.uint32(0x8000)
    p = lax.bitcast_convert_type((bits >> np.uint32(16)).astype(np.uint16), jnp.bfloat16)
    return online.dot(p, v, dtype=np.float32)
