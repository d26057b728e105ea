"""Attention of integers, in two walks: the largest logit of a row, and then sums relative to it.

The online softmax rescales its sums whenever a larger logit comes, which rounds, so that its bits
depend on the order of tiles. Here the largest logit is known before anything is summed. It costs
the scores once more, and then all sums are those of integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jax import Array
from jax import numpy as jnp

from .._passes.operands import Dimensions, Operands, kv_tile, q_tile
from .._passes.plan import Plan
from .._passes.products import Products
from .._passes.walk import key_tiles, over_key_tiles, over_query_tiles
from .._tiles.load import put_tile
from .._tiles.tile import QueryTile
from .fixed_point import (
    FRACTION,
    Multiplier,
    Wide,
    in_bytes,
    over_256,
    power_of_two,
    products,
    shifted,
)

MOST_KEYS = 2**16  # whose sums are at most 2^54: the high part of those is at most 2^30
MOST_KEYS_OF_TILE = 2**14  # whose sums of products of bytes are below 2^31
MOST_HEAD_DIM = 2**8  # whose sums over 256 are at most 2^30
MOST_LOGIT = 2**14  # of base 2: with FRACTION bits below 2^30, and differences below 2^31
_NOTHING = np.int32(-(2**31))  # below every logit


@dataclasses.dataclass(frozen=True)
class Q15:
    """What turns products of numbers with 15 bits behind the point into logits of base 2."""

    scale: Multiplier  # log2(e) times that of the softmax

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        """Scores are int32 logits with FRACTION bits; weighed values are the parts of sums."""
        assert not fused
        int32 = np.dtype(np.int32)
        q = in_bytes(q_tile(plan, tile, operands.q, int32), 2)

        def scores(j: Array) -> Array:
            k = kv_tile(plan, tile, operands.k, j, int32)
            x = over_256(products(q, in_bytes(k, 2), -1))  # with 22 bits behind the point
            return shifted(self.scale.times(x), 22 - FRACTION - self.scale.exponent)

        def values(j: Array) -> list[Array]:
            v = kv_tile(plan, tile, operands.v, j, int32)
            # A column of ones sums up the probabilities.
            return in_bytes(jnp.pad(v, [(0, 0), (0, 0), (0, 1)], constant_values=1), 2)

        return Products(
            scores=scores,
            values=values,
            weigh=lambda p, v: products(in_bytes(p, 3), v, -2),  # pyright: ignore
            finish=lambda o: o,
            exp=power_of_two,
            floats=False,
        )


def attend_q15(operands: Operands, plan: Plan) -> Array:
    """The output, int16 (B, T, N, Hv)."""
    dims = Dimensions.of(operands, plan)
    axes = plan.layout.axes(dims.instances, dims.N, dims.T, dims.Hv)
    out = jnp.zeros(tuple(axes), np.int16)
    if dims.empty:
        return out

    def step(tile: QueryTile, out: Array) -> Array:
        heads = tile.heads * tile.groups
        new = _tile(operands, plan, tile).reshape(1, heads, tile.q.block, dims.Hv)
        start = tile.instance, tile.head * tile.groups, tile.q.start(tile.i)
        return put_tile(plan.layout, out, new, *start)

    return over_query_tiles(operands, plan, step, out, copies=4)


def _tile(operands: Operands, plan: Plan, tile: QueryTile) -> Array:
    """int16 (heads, rows, Hv) of one tile of queries."""
    q15, visited = plan.format.products(operands, plan, tile), key_tiles(operands, tile)

    def largest(masked: bool) -> Callable[[Array, Array], Array]:
        def at(j: Array, m: Array) -> Array:
            y = q15.scores(j)
            if masked:
                y = jnp.where(operands.scores.keep(tile, j), y, _NOTHING)
            return jnp.maximum(m, jnp.max(y, axis=-1, keepdims=True))

        return at

    m = jnp.full((tile.heads, tile.rows, 1), _NOTHING)
    m = over_key_tiles(operands, tile, visited, largest, m)

    def sums(masked: bool) -> Callable[[Array, Wide], Wide]:
        def at(j: Array, weighed: Wide) -> Wide:
            p = q15.exp(m - q15.scores(j))
            if masked:
                p = jnp.where(operands.scores.keep(tile, j), p, 0)
            return weighed.plus(q15.weigh(p, q15.values(j)))  # pyright: ignore

        return at

    zeros = jnp.zeros((tile.heads, tile.rows, operands.v.shape[-1] + 1), np.int32)
    weighed = over_key_tiles(operands, tile, visited, sums, Wide(zeros, zeros))
    return weighed.over_last().astype(np.int16)
