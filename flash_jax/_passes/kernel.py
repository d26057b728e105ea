"""The kernel of a tile: scores, probabilities and weighed values in one operation of XLA.

From a shift c that is known before, what a tile of keys adds to a row is

    [o | l] += exp(s - c) [v | 1],    softmax(s) @ v = o / l,    logsumexp(s) = c + log(l)

XLA:CPU makes one parallel kernel of that (jaxlib 0.11 and 0.12): tasks of some rows of one head, in
which no score leaves the caches. It does so where every value in between ends in the next one, and
where all operations are such that its library has: no select and no comparison, so that a mask is a
tile of zeros and -inf, which is added.

The shift is the largest of the row's first logits, so that s - c rounds no more than s has been
rounded already; or 0, where the row reads none of these keys. It serves a row where l is neither
tiny nor huge. That is checked for every row, and also that its sums are finite, so that no NaN or
infinity behind a mask has reached them. A row that fails is left to the exact loop (``forward``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax import Array
from jax import numpy as jnp

from .._tiles.axis import Axis
from .._tiles.tile import QueryTile
from .._tiles.xla import grown_from
from . import online_softmax as online
from .operands import Dimensions, Operands, with_sinks
from .plan import Plan
from .products import Products
from .walk import first_visited, key_tiles, over_key_tiles

_ONES = 16  # columns of them: as many as a vector holds cost no more than one
_LEAST, _MOST = np.exp(-20.0), np.exp(60.0)  # l: its products with values stay in float32's range
_FEWEST_ROWS = 4096
_FIRST = 64  # keys that the shift is taken from


def with_ones(operands: Operands, plan: Plan) -> Operands:
    """The operands with [v | 1] for v where visits are small, and would each bring their ones."""
    mask = operands.scores.mask
    if mask is None or mask.blocks is None or operands.quantization is not None:
        return operands
    # As in ``_weighed``. Bfloat16 is the only dtype in which probabilities are rounded here.
    exact = plan.lse and plan.multiplied == jnp.bfloat16
    return operands._replace(v=_beside(operands.v, 0 if exact else 1))


def kernel_tile(
    operands: Operands, plan: Plan, tile: QueryTile, width: int
) -> tuple[online.State, Array]:
    """The state (heads, rows) of one tile of queries after all the keys its rows may read.

    And whether each row is right, (heads, rows).

    Args:
        width: of the values, which may have ones beside them.
    """
    scores, acc = operands.scores, Dimensions.of(operands, plan).acc
    visited, beside = key_tiles(operands, tile, True), operands.v.shape[-1] != width
    shift = _shift(operands, plan, tile, first_visited(visited))
    products = plan.format.products(operands, plan, tile, True)

    def step(masked: bool) -> Callable[[Array, tuple[Array, Array]], tuple[Array, Array]]:
        def at(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            sums, reads = carry
            kept = scores.kept(tile, j) if masked else None
            s = _logits(operands, tile, products, j, kept)
            if kept is None:
                reads = jnp.ones_like(reads)
            else:
                some = jnp.any(kept, axis=-1, keepdims=True)
                reads |= tile.as_rows(some, 1)[..., 0]
            p = jnp.exp(s - grown_from(shift, j)[..., None])
            return sums + _weighed(products, p, products.values(j), plan.lse, beside), reads

        return at

    sums = jnp.zeros((tile.heads, tile.rows, width + _ONES), acc)
    reads = jnp.zeros((tile.heads, tile.rows), bool)
    sums, reads = over_key_tiles(operands, tile, visited, step, (sums, reads), True)
    o, l = sums[..., :width], sums[..., width]
    right = jnp.where(reads, (l > _LEAST.astype(acc)) & (l < _MOST.astype(acc)), l == 0)
    right &= jnp.isfinite(jnp.sum(o * 0, axis=-1))
    # As if all keys were one of logit lse: so p = exp(s - m) / l is at most 1.
    l = jnp.where(reads, l, 1)
    state = online.State(
        m=jnp.where(reads, shift + jnp.log(l), -jnp.inf),
        l=reads.astype(acc),
        o=products.finish(o / l[..., None]),
    )
    return with_sinks(operands, tile, state), right


def whole_rows(operands: Operands, plan: Plan, tile: QueryTile, rows: int) -> Array:
    """softmax(s) v (heads, rows, Hv) of rows that read all keys, which lie in one tile.

    The shift is each row's maximum, so that this is right whatever the numbers are.

    Args:
        rows: how many the kernel has, of all heads and instances.
    """
    products, j = plan.format.products(operands, plan, tile, True), jnp.int32(0)
    s = _logits(operands, tile, products, j, kept=None)
    p, v = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)), products.values(j)
    # A sum is faster than more columns of a product in float32. Then its quotient must be one of
    # the operations that XLA's library takes, which are not too small.
    if not products.coarse and rows >= _FEWEST_ROWS:
        return products.finish(products.weigh(p, v) / jnp.sum(p, axis=-1, keepdims=True))
    sums, width = products.weigh(p, _beside(v, 1)), v.shape[-1]
    return products.finish(sums[..., :width] / sums[..., width, None])


def _weighed(products: Products, p: Array, v: Array, exact: bool, beside: bool) -> Array:
    """p [v | 1], (heads, rows, Hv + ones).

    Args:
        exact: with the sum of unrounded probabilities.
        beside: whether v has its ones already, or zeros where they are exact.
    """
    exact = exact and products.coarse
    v = v if beside else _beside(v, 0 if exact else 1)
    if not exact:
        return products.weigh(p, v)
    ones = np.zeros(v.shape[-1], p.dtype)
    ones[-_ONES:] = 1
    return products.weigh(p, v) + jnp.sum(p, axis=-1, keepdims=True) * ones


def _beside(v: Array, number: int) -> Array:
    return jnp.concatenate([v, jnp.full((*v.shape[:-1], _ONES), number, v.dtype)], axis=-1)


def _shift(operands: Operands, plan: Plan, tile: QueryTile, first: Array) -> Array:
    """The largest logit of each row among the first keys of key tile ``first``, (heads, rows)."""
    count = min(_FIRST, max(_ONES, tile.kv.block // 8))
    part = tile._replace(kv=Axis.of(tile.kv.length, count), wide=None if tile.wide is None else 1)
    j = first * tile.kv.block // count
    products = plan.format.products(operands, plan, part, True)
    kept = None if operands.scores.always_full(tile.kv, True) else operands.scores.kept(part, j)
    m = jnp.max(_logits(operands, part, products, j, kept), axis=-1)
    return online.finite_shift(m)


def _logits(
    operands: Operands, tile: QueryTile, products: Products, j: Array, kept: Array | None
) -> Array:
    """The logits of key tile j, -inf where they are not kept; None: all are."""
    s = operands.scores.own_logits(tile, j, products.scores(j), True)
    return s if kept is None else tile.plus(s, jnp.where(kept, 0, -jnp.inf).astype(s.dtype))
