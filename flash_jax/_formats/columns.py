"""The two products of few query rows with all keys and values, heads last, in bfloat16.

The keys of all heads are one matrix (S, K H), which is read where it lies, and so are the values. A
query row is zero outside its head, and of the weighed values of all heads a row takes its own:

    s[(k, r)] = [0 .. q[k, r] .. 0] . keys        o[(k, r)] = (p[k, r] values)[k]

That multiplies K times as much, which takes less time than reading where the processor multiplies
bfloat16. The zeros change nothing but where a key is not finite: then the sums are not, and the
walk's format computes them again, head by head (``few_rows``).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from jax import Array
from jax import numpy as jnp

from .._passes.operands import Operands, q_tile
from .._passes.plan import Plan
from .._passes.products import Products
from .._tiles.load import slice_tile
from .._tiles.tile import QueryTile
from .._tiles.xla import apart, dot_of_rows, in_pieces, rounded
from .few_rows import of_all_heads


@dataclasses.dataclass(frozen=True)
class Columns:
    """bfloat16, of all heads together."""

    score_bytes: ClassVar[int] = 6
    least_queries: ClassVar[int] = 8

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        assert not fused
        dtype, K, R = np.dtype(jnp.bfloat16), tile.heads, tile.rows
        q = apart(q_tile(plan, tile, operands.q, dtype))
        rows = of_all_heads(q)

        def held(x: Array, j: Array) -> Array:
            """(keys, K H) of key tile j."""
            if tile.kv.count > 1:
                start = tile.kv.start(j)
                args = tile.entry_of(x), tile.head, K, start, tile.kv.block
                return slice_tile(plan.kv_layout, x, *args).reshape(tile.kv.block, -1)
            return tile.of_instance(x).reshape(tile.kv.block, -1)

        def scores(j: Array) -> Array:
            s = dot_of_rows(rows, held(operands.k, j), -1, np.float32).reshape(K, R, -1)
            return rounded(s * tile.of_instance(operands.scores.scale))

        def weigh(p: Array, v: Array) -> Array:
            p = p.astype(dtype).reshape(K * R, -1)
            weighed = functools.partial(dot_of_rows, axis=-2, dtype=np.float32)
            o = in_pieces(weighed, p, v).reshape(K, R, K, -1)
            return jnp.moveaxis(jnp.diagonal(o, axis1=0, axis2=2), -1, 0)

        return Products(
            scores=scores,
            values=lambda j: held(operands.v, j),
            weigh=weigh,
            finish=lambda o: o,
            coarse=True,
        )
