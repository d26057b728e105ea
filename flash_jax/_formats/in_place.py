"""The two products of few query rows with all keys and values, which lie heads first in a cache.

Reading is what takes the time, so nothing is done to keys and values beside the products: a slice,
a transposition or a select would write them once more. The few rows stand on the left, but those
that meet bfloat16 keys (``dot_of_many``).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from jax import Array

from .._passes.operands import Dimensions, Operands, kv_tile, q_tile
from .._passes.plan import Plan
from .._passes.products import Products
from .._tiles.tile import QueryTile
from .._tiles.xla import apart, dot_of_batch, dot_of_many, dot_of_rows, in_pieces, rounded


@dataclasses.dataclass(frozen=True)
class InPlace:
    """Floats, multiplied in a dtype: that of the sums, or bfloat16."""

    dtype: np.dtype
    score_bytes: ClassVar[int] = 6
    least_queries: ClassVar[int] = 8

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        assert not fused
        acc = Dimensions.of(operands, plan).acc
        # Next to a transposition XLA multiplies bfloat16 in float32 (0.10, 0.12).
        q = apart(q_tile(plan, tile, operands.q, self.dtype))
        if self.dtype == acc:
            q = operands.scores.scaled(tile, q)

        whole = tile.kv.count == 1 and operands.pages is None
        # A slice is multiplied by one row several times slower, too (0.12).
        product = dot_of_batch if whole and self.dtype == acc else dot_of_rows

        def held(x: Array, j: Array) -> Array:
            if whole:
                return tile.of_instance(x).astype(self.dtype)
            return kv_tile(plan, tile, x, j, self.dtype, operands.pages)

        def scores(j: Array) -> Array:
            k = held(operands.k, j)
            if self.dtype != acc:
                # Scaled afterwards: a scaled query would have to be rounded.
                return rounded(dot_of_many(q, k, acc) * tile.of_instance(operands.scores.scale))
            s = product(q, k, -1, acc)
            # A product of size 1 is none to XLA, which would fuse it with the sums that follow.
            return s if q.shape[-1] > 1 else rounded(s)

        def weigh(p: Array, v: Array) -> Array:
            weighed = functools.partial(product, axis=-2, dtype=acc)
            p = p.astype(self.dtype)
            return weighed(p, v) if self.dtype == acc else in_pieces(weighed, p, v)

        return Products(
            scores=scores,
            values=lambda j: held(operands.v, j),
            weigh=weigh,
            finish=lambda o: o,
        )
