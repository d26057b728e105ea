"""The two products of a tile, of floats: scores q k^T, and values weighed by probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import Array
from jax import numpy as jnp

from . import _online_softmax as online
from ._operands import Operands, Static, kv_tile, q_tile
from ._query_tile import QueryTile


class Products(NamedTuple):
    """What the scan over the key tiles of one query tile multiplies."""

    scores: Callable[[Array], Array]  # j -> scale * q . k, (heads, rows, block_kv)
    values: Callable[[Array], Array]  # j -> v (heads, block_kv, Hv)
    weigh: Callable[[Array, Array], Array]  # p (rows, block_kv), v of one head -> p v (rows, Hv)
    finish: Callable[[Array], Array]  # sums of p v (heads, rows, Hv) -> in the unit of the values
    absorb: Callable[..., online.State]  # (state, s, v, weigh) of one head


def float_products(operands: Operands, static: Static, tile: QueryTile) -> Products:
    """The products in float32, or float64 of float64."""
    acc = jnp.promote_types(operands.q.dtype, jnp.float32)
    q = operands.scores.scaled(tile, q_tile(static, tile, operands.q, acc))
    return Products(
        scores=lambda j: operands.scores.products(q, kv_tile(tile, operands.k, j, acc)),
        values=lambda j: kv_tile(tile, operands.v, j, acc),
        weigh=online.dot,
        finish=lambda o: o,
        absorb=online.absorb,
    )
