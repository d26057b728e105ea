"""Few query rows times keys and values in pages: each row of a batch finds its own by a table.

A pool (pages, K, P, H) holds the pages of all rows, in any order. A key tile is a few pages, which
are multiplied page by page, heads by heads: nothing is transposed beside a product.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._passes.operands import Dimensions, Operands, q_tile
from .._passes.plan import Plan
from .._passes.products import Products
from .._tiles.tile import QueryTile
from .._tiles.xla import apart, dot_of_rows


@dataclasses.dataclass(frozen=True)
class Pages:
    """Floats, multiplied in a dtype. A key tile is a whole number of pages."""

    dtype: np.dtype

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        assert not fused
        assert operands.pages is not None
        acc = Dimensions.of(operands, plan).acc
        size = operands.k.shape[-2]
        count = tile.kv.block // size
        table = tile.of_instance(operands.pages)
        q = apart(q_tile(plan, tile, operands.q, self.dtype)).astype(self.dtype)
        q = jnp.broadcast_to(q, (count, *q.shape))
        scale = tile.of_instance(operands.scores.scale)

        def held(x: Array, j: Array) -> Array:
            """(K, keys, H) of key tile j; a page that there is not is any other."""
            page = lax.dynamic_slice_in_dim(table, j * np.int32(count), count)
            pages = jnp.take(tile.of_instance(x), jnp.maximum(page, 0), axis=0, mode="clip")
            return jnp.swapaxes(pages, 0, 1).reshape(tile.heads, tile.kv.block, -1)

        def by_page(x: Array) -> Array:
            """(K, keys, H) as (pages, K, P, H), which ``held`` has before its transposition."""
            x = jnp.swapaxes(x.reshape(tile.heads, count, size, -1), 0, 1)
            return x.astype(self.dtype)

        def scores(j: Array) -> Array:
            s = dot_of_rows(q, by_page(held(operands.k, j)), -1, acc) * scale
            return jnp.moveaxis(s, 0, 2).reshape(tile.heads, tile.rows, -1)

        def weigh(p: Array, v: Array) -> Array:
            p = jnp.moveaxis(p.reshape(tile.heads, tile.rows, count, size), 2, 0)
            o = dot_of_rows(apart(p.astype(self.dtype)), by_page(v), -2, acc)
            return jnp.sum(o, axis=0)

        return Products(
            scores=scores,
            values=lambda j: held(operands.v, j),
            weigh=weigh,
            finish=lambda o: o,
        )
