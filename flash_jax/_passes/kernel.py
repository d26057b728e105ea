"""The kernel of a tile: scores, probabilities and weighed values in one operation of XLA.

From a shift c that is known before, what a tile of keys adds to a row is

    [o | l] += exp(s - c) [v | 1],    softmax(s) @ v = o / l,    logsumexp(s) = c + log(l)

XLA:CPU makes one parallel kernel of that (jaxlib 0.11 and 0.12): tasks of some rows of one head, in
which no score leaves the caches. It does so where every value in between ends in the next one, and
where all operations are such that its library has: no select and no comparison, so that a mask is a
tile of zeros and -inf, which is added.

A shift serves a row where exp(-20) < l < exp(20): s - c then rounds no more than products that far
apart have been rounded already. That is checked for every row, and also that its sums are finite,
so that no NaN or infinity behind a mask has reached them. Where a row fails, the exact loop does
all the work again (``forward``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax import Array
from jax import numpy as jnp

from .._tiles.tile import Axis, QueryTile
from .._tiles.xla import grown_from
from . import online_softmax as online
from .operands import Dimensions, Operands, with_sinks
from .plan import Plan
from .products import Products
from .scores import Local
from .walk import first_visited, over_key_tiles

_ONES = 16  # columns of them: as many as a vector holds cost no more than one
_NEAR = 20.0  # of the shift are the logs of the sums that are right
_GUESSED = 64  # keys that the shift is guessed from


def kernel_tile(operands: Operands, plan: Plan, tile: QueryTile) -> tuple[online.State, Array]:
    """The state (heads, rows) of one tile of queries after all the keys its rows may read.

    And whether each row is right, (heads, rows).
    """
    scores, acc = operands.scores, Dimensions.of(operands, plan).acc
    products, shift = plan.format.products(operands, plan, tile, True), _guess(operands, plan, tile)
    width = operands.v.shape[-1]

    def step(masked: bool) -> Callable[[Array, tuple[Array, Array]], tuple[Array, Array]]:
        def at(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            sums, reads = carry
            s = scores.logits(tile, j, scores.local(tile, j), products.scores(j), True)
            if masked:
                kept = scores.kept(tile, j)
                s = tile.plus(s, jnp.where(kept, 0, -jnp.inf).astype(acc))
                reads |= tile.as_rows(jnp.any(kept, axis=-1, keepdims=True), 1)[..., 0]
            else:
                reads = jnp.ones_like(reads)
            p = jnp.exp(s - grown_from(shift, j)[..., None])
            return sums + _weighed(products, p, products.values(j), plan.lse), reads

        return at

    sums = jnp.zeros((tile.heads, tile.rows, width + _ONES), acc)
    reads = jnp.zeros((tile.heads, tile.rows), bool)
    sums, reads = over_key_tiles(operands, tile, step, (sums, reads))
    o, l = sums[..., :width], sums[..., width]
    near = (l > np.exp(-_NEAR).astype(acc)) & (l < np.exp(_NEAR).astype(acc))
    right = jnp.where(reads, near, l == 0)
    right &= jnp.isfinite(jnp.sum(o * 0, axis=-1))
    # As if all keys were one of logit lse: so p = exp(s - m) / l is at most 1.
    l = jnp.where(reads, l, 1)
    state = online.State(
        m=jnp.where(reads, shift + jnp.log(l), -jnp.inf),
        l=reads.astype(acc),
        o=products.finish(o / l[..., None]),
    )
    return with_sinks(operands, tile, state), right


def whole_rows(operands: Operands, plan: Plan, tile: QueryTile) -> Array:
    """softmax(s) v (heads, rows, Hv) of rows that read all keys, which lie in one tile.

    The shift is each row's maximum, so that this is right whatever the numbers are.
    """
    scores, j = operands.scores, jnp.int32(0)
    products = plan.format.products(operands, plan, tile, True)
    s = scores.logits(tile, j, scores.local(tile, j), products.scores(j), True)
    p, v = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)), products.values(j)
    sums, width = products.weigh(p, _beside(v, 1)), v.shape[-1]
    return products.finish(sums[..., :width] / sums[..., width, None])


def _weighed(products: Products, p: Array, v: Array, exact: bool) -> Array:
    """p [v | 1], (heads, rows, Hv + ones); exact: with the sum of unrounded probabilities."""
    if not (exact and products.coarse):
        return products.weigh(p, _beside(v, 1))
    ones = np.zeros(v.shape[-1] + _ONES, p.dtype)
    ones[v.shape[-1] :] = 1
    return products.weigh(p, _beside(v, 0)) + jnp.sum(p, axis=-1, keepdims=True) * ones


def _beside(v: Array, number: int) -> Array:
    return jnp.concatenate([v, jnp.full((*v.shape[:-1], _ONES), number, v.dtype)], axis=-1)


def _guess(operands: Operands, plan: Plan, tile: QueryTile) -> Array:
    """About the largest logit of each row, (heads, rows): that of the first keys it may read."""
    scores, count = operands.scores, min(_GUESSED, max(_ONES, tile.kv.block // 8))
    part = tile._replace(kv=Axis.of(tile.kv.length, count))
    j = first_visited(operands, tile) * tile.kv.block // count
    alone = Local(scores.local(part, j).soft_cap, None, None)
    s = plan.format.products(operands, plan, part, True).scores(j)
    return jnp.max(scores.logits(part, j, alone, s, True), axis=-1)
