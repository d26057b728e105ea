"""The two products of a tile of few query rows, as in decoding: keys and values are read once.

Reading them is what takes the time, so they stay as the caller laid them out, heads last. The keys
of all heads are one matrix (block_kv, K H), and each query row is a column that is zero outside its
head:

    s[(k, r)] = keys [0 .. q[k, r] .. 0]

which multiplies K times as much, in the shadow of the reads. The zeros change nothing but where a
key is not finite: then each head is multiplied alone. Values are weighed and summed elementwise.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._passes.operands import Dimensions, Operands, kv_tile, q_tile
from .._passes.plan import Plan
from .._passes.products import Products
from .._tiles.load import slice_tile
from .._tiles.tile import QueryTile
from .._tiles.xla import apart, dot, in_every_element, part_of, rounded

_PARTS = 16  # of the values, added up elementwise before the sum over what is left


@dataclasses.dataclass(frozen=True)
class FewRows:
    """Floats of few query rows, multiplied in a dtype; keys and values are laid out heads last."""

    dtype: np.dtype

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        assert not fused
        return _streaming_products(self.dtype, operands, plan, tile)


def _streaming_products(
    dtype: np.dtype, operands: Operands, plan: Plan, tile: QueryTile
) -> Products:
    acc = Dimensions.of(operands, plan).acc
    q = q_tile(plan, tile, operands.q, dtype)
    if dtype == acc:
        q = operands.scores.scaled(tile, q)
    columns = of_all_heads(q)

    def positions(x: Array, j: Array) -> Array:
        """(width, heads, H) of key tile j."""
        if tile.wide is not None:
            return jnp.swapaxes(kv_tile(plan, tile, x, j, x.dtype), 0, 1)
        start, size = tile.kv.start(j), tile.kv.block
        return slice_tile(plan.kv_layout, x, tile.entry_of(x), tile.head, tile.heads, start, size)

    def scores(j: Array) -> Array:
        k = positions(operands.k, j).astype(dtype)
        together = dot(k.reshape(tile.width, -1), columns, -1, acc)

        def head_by_head() -> Array:
            # Of one row XLA would convert 16-bit keys, all of them and whether needed or not.
            rows = jnp.concatenate([q, q], axis=1)
            heads = lax.iota(np.int32, tile.heads)
            s = lax.map(lambda h: dot(k[:, h], rows[h], -1, acc)[:, : tile.rows], heads)
            return jnp.moveaxis(s, 0, 1).reshape(together.shape)

        def mend() -> Array:
            return jnp.where(jnp.isfinite(together), together, head_by_head())

        finite = in_every_element(jnp.isfinite(jnp.sum(together * 0)))
        s = lax.cond(finite, lambda: together, mend)
        s = s.T.reshape(tile.heads, tile.rows, tile.width)
        return s if dtype == acc else rounded(s * tile.of_instance(operands.scores.scale))

    return Products(
        scores=scores,
        values=lambda j: positions(operands.v, j),
        weigh=_weigh,
        finish=lambda o: o,
    )


def of_all_heads(q: Array) -> Array:
    """Queries (heads, rows, H) as (heads * rows, heads * H), zero outside their heads."""
    own = np.eye(len(q), dtype=bool)[:, None, :, None]
    return jnp.where(own, q[:, :, None], 0).reshape(q.shape[0] * q.shape[1], -1)


def _weigh(p: Array, v: Array) -> Array:
    """p (heads, rows, block_kv) times v (block_kv, heads, Hv): (heads, rows, Hv)."""
    p, v = jnp.transpose(p, (2, 1, 0))[..., None], v[:, None]  # (block_kv, rows, heads, Hv)
    count = max(1, len(v) // _PARTS)
    parts = [slice(i, i + count) for i in range(0, len(v) - count + 1, count)]
    parts.append(slice(parts[-1].stop, None))
    *products, rest = (part_of(v, part, p.dtype) * p[part] for part in parts)
    sums = (jnp.sum(apart(x), axis=0) for x in (sum(products), rest))  # pyright: ignore
    return jnp.swapaxes(sum(sums), 0, 1)
