"""The two products of few query rows with all keys and values, which lie heads first in a cache.

Reading is what takes the time, so nothing is done to keys and values beside the products: a slice,
a transposition or a select would write them once more. The few rows stand on the left.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jax import Array
from jax import numpy as jnp

from .._passes.operands import Dimensions, Operands, kv_tile, q_tile
from .._passes.plan import Plan
from .._passes.products import Products
from .._tiles.tile import QueryTile
from .._tiles.xla import apart, dot, rounded


@dataclasses.dataclass(frozen=True)
class InPlace:
    """Floats, multiplied in a dtype: that of the sums, or bfloat16."""

    dtype: np.dtype

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        assert not fused
        acc = Dimensions.of(operands, plan).acc
        # Next to a transposition XLA multiplies bfloat16 in float32 (0.10, 0.12).
        q = apart(q_tile(plan, tile, operands.q, self.dtype))
        if self.dtype == acc:
            q = operands.scores.scaled(tile, q)

        whole = tile.kv.count == 1
        # Of one row XLA would convert 16-bit keys, all of them, and a slice of others is multiplied
        # several times slower (0.12; the former in 0.10, too).
        twice = tile.rows == 1 and not (whole and self.dtype == acc)

        def held(x: Array, j: Array) -> Array:
            if whole:
                return tile.of_instance(x).astype(self.dtype)
            return kv_tile(plan, tile, x, j, self.dtype)

        def multiplied(rows: Array, x: Array, axis: int) -> Array:
            rows = rows.astype(self.dtype)
            if not twice:
                return dot(rows, x, axis, acc)
            return dot(jnp.concatenate([rows, rows], axis=1), x, axis, acc)[:, :1]

        def scores(j: Array) -> Array:
            s = multiplied(q, held(operands.k, j), -1)
            if self.dtype != acc:
                # Scaled afterwards: a scaled query would have to be rounded.
                s = s * tile.of_instance(operands.scores.scale)
            # A product of size 1 is none to XLA, which would fuse it with the sums that follow.
            return s if self.dtype == acc and q.shape[-1] > 1 else rounded(s)

        return Products(
            scores=scores,
            values=lambda j: held(operands.v, j),
            weigh=lambda p, v: multiplied(p, v, -2),
            finish=lambda o: o,
        )
