"""Parts of a sequence, by minimum normalised cut.

A sequence of n blocks is a graph: blocks i and j are joined by their affinity w_ij >= 0.
Consecutive blocks a..b-1 are a part with

    vol(a, b) = the affinity of its blocks to all,   cut(a, b) = that to blocks outside it,

and k parts have the normalised cut  sum cut / vol  over the parts. It is 0 where nothing joins
them, and k - 1 where the affinity has no structure, all w_ij being equal. Two-dimensional
cumulative sums give every cut and volume at once, so the cost of all n^2 / 2 parts takes O(n^2).
The cheapest k parts that make up the sequence follow by dynamic programming, exactly, for every k
up to a limit:

    best_k(b) = min over a < b of best_{k-1}(a) + cut(a, b) / vol(a, b)

Shi & Malik, Normalized Cuts and Image Segmentation, 2000, https://doi.org/10.1109/34.868688
Malioutov & Barzilay, Minimum Cut Model for Spoken Lecture Segmentation, 2006, section 3,
https://aclanthology.org/P06-1004/
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from .._checks.numbers import as_option, positive_integer


class MincutParts(NamedTuple):
    """Parts of sequences of n blocks: at most ``max_parts`` of them, of consecutive blocks.

    Attributes:
        labels: (..., n) int32, the part of each block, counted from 0.
        count: (...) int32, how many parts there are.
        boundaries: (..., max_parts - 1) int32, the first block of part 1, of part 2 and so on; n
            where there is no such part.
        valid: (..., max_parts - 1) bool, whether there is such a part.
        cuts: (..., max_parts - 1) float32, the cut at each boundary: the affinity between all
            blocks before it and all from it on; 0 where there is none.

    Example:
        >>> parts = mincut_parts(np.kron(np.eye(2), np.ones((3, 3))) + 0.1, max_parts=3)
        >>> parts.boundaries.tolist(), parts.valid.tolist()
        ([3, 6], [True, False])
    """

    labels: Array
    count: Array
    boundaries: Array
    valid: Array
    cuts: Array


def mincut_parts(
    affinity: ArrayLike, max_parts: int = 8, *, min_blocks: int = 1, threshold: float = 0.75
) -> MincutParts:
    """Cuts a sequence of blocks into parts that have little to do with one another.

    Of all ways to cut n blocks into k parts, this is the one with the smallest normalised cut. A
    further part is taken as long as it adds less than ``threshold`` to that; where an affinity has
    no structure, each part adds 1. O(max_parts n^2), one program for all values, batched over
    leading axes.

    Args:
        affinity: floats (..., n, n), >= 0: how much block i has to do with block j. It is
            symmetrised: only w_ij + w_ji counts. Where it is traced, what is negative counts as 0.
        max_parts: how many parts there may be.
        min_blocks: how many blocks each of several parts has at least.
        threshold: what one more part may add to the normalised cut. ``jnp.inf`` gives as many parts
            as there may be.

    Returns:
        ``MincutParts``. They have no derivative.

    Raises:
        ValueError: affinity is not (..., n, n), n > 0, or has a negative or infinite entry or a
            NaN; a number is not positive.
        TypeError: affinity holds no floats; max_parts or min_blocks is no integer.

    Example:
        >>> affinity = np.kron(np.eye(2), np.ones((3, 3))) + 0.1  # two times three blocks
        >>> parts = mincut_parts(affinity)
        >>> parts.labels.tolist(), int(parts.count)
        ([0, 0, 0, 1, 1, 1], 2)

    References:
        [1] Shi & Malik, Normalized Cuts and Image Segmentation, 2000,
            https://doi.org/10.1109/34.868688
        [2] Malioutov & Barzilay, Minimum Cut Model for Spoken Lecture Segmentation, 2006,
            https://aclanthology.org/P06-1004/
    """
    affinity = as_affinity(affinity)
    max_parts = positive_integer("max_parts", max_parts)
    min_blocks = positive_integer("min_blocks", min_blocks)
    if isinstance(threshold, bool) or not isinstance(threshold, float | int | np.floating):
        raise TypeError(f"threshold must be a number, known at trace time; it is {threshold!r}")
    if not threshold > 0:
        raise ValueError(f"threshold must be > 0; it is {threshold}")
    return _parts(lax.stop_gradient(affinity), max_parts, min_blocks, float(threshold))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _parts(affinity: Array, max_parts: int, min_blocks: int, threshold: float) -> MincutParts:
    one = functools.partial(
        _of_one, max_parts=max_parts, min_blocks=min_blocks, threshold=threshold
    )
    return over_leading_axes(one, 2)(affinity)


def _of_one(affinity: Array, *, max_parts: int, min_blocks: int, threshold: float) -> MincutParts:
    """The parts of one affinity (n, n)."""
    n = affinity.shape[0]
    sums = cumulative(affinity)
    first = lax.broadcasted_iota(np.int32, sums.shape, 0)
    end = lax.broadcasted_iota(np.int32, sums.shape, 1)
    size = end - first
    allowed = (size >= min_blocks) | ((first == 0) & (end == n))
    cost = jnp.where(allowed & (size > 0), _cut_shares(sums), np.float32(jnp.inf))

    def one_more(best: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        total = best[:, None] + cost
        at = jnp.argmin(total, axis=0).astype(np.int32)
        best = jnp.min(total, axis=0)
        return best, (best[n], at)

    _, (values, at) = lax.scan(one_more, cost[0], None, length=max_parts - 1)
    values = jnp.concatenate([cost[0, n:], values])
    added = values[1:] - values[:-1]  # inf, or inf - inf = NaN, where there are no such parts
    count = 1 + jnp.sum(jnp.cumprod((added < threshold).astype(np.int32)), dtype=np.int32)
    return _walk_back(sums, at, count)


def _walk_back(sums: Array, at: Array, count: Array) -> MincutParts:
    """The parts that end where n does: at[k - 2, b] begins the last of k parts of blocks 0..b-1."""
    n = sums.shape[0] - 1

    def step(end: Array, k: Array) -> tuple[Array, Array]:
        begin = jnp.where(k <= count, at[k - 2, end], end)
        return begin, begin

    ks = lax.iota(np.int32, at.shape[0]) + 2
    boundaries = ks  # none of one part
    if at.shape[0]:
        _, boundaries = lax.scan(step, np.int32(n) + 0 * count, ks, reverse=True)
    blocks = lax.iota(np.int32, n)
    labels = jnp.sum(blocks[:, None] >= boundaries[None], axis=1, dtype=np.int32)
    total = sums[boundaries, n]
    cuts = jnp.maximum(total - sums[boundaries, boundaries], 0)
    return MincutParts(labels, count, boundaries, ks <= count, cuts)


def cumulative(affinity: Array) -> Array:
    """(n + 1, n + 1): entry (a, b) is the sum of the symmetrised affinity[:a, :b]."""
    affinity = (affinity + affinity.T) / 2
    return jnp.pad(jnp.cumsum(jnp.cumsum(affinity, axis=0), axis=1), ((1, 0), (1, 0)))


def _cut_shares(sums: Array) -> Array:
    """cut(a, b) / vol(a, b) of blocks a..b-1, for all a and b; 0 where vol is."""
    inside = jnp.diagonal(sums)
    to_all = sums[:, -1]
    volume = to_all[None] - to_all[:, None]
    within = inside[None] - 2 * sums + inside[:, None]
    some = volume > 0
    share = (volume - within) / jnp.where(some, volume, 1)
    return jnp.where(some, jnp.clip(share, 0, 1), 0)


def as_affinity(x: Any, name: str = "affinity") -> Array:
    """x as float32 (..., n, n), n > 0, without negative entries; or an error that names it."""
    x = as_option(name, x)
    if x is None or not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floats; it is {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or x.shape[-1] == 0:
        raise ValueError(f"{name} must be (..., n, n), n > 0; its shape is {x.shape}")
    if isinstance(x, Tracer):
        return jnp.maximum(x.astype(np.float32), 0)
    values = np.asarray(x).astype(np.float32)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        found = "one is negative" if (values < 0).any() else "one is not finite"
        raise ValueError(f"{name} must have finite entries >= 0; {found}")
    return jnp.asarray(x).astype(np.float32)


def over_leading_axes(f: Callable[..., Any], *ranks: int) -> Callable[..., Any]:
    """f of arrays of these ranks, made one of arrays with further axes in front, which broadcast.

    In f no array is of a lower rank than another where they meet, which
    ``jax_numpy_rank_promotion="raise"`` would refuse.
    """

    def mapped(*arrays: Array) -> Any:
        own = [x.shape[x.ndim - rank :] for x, rank in zip(arrays, ranks, strict=True)]
        leading = np.broadcast_shapes(
            *(x.shape[: x.ndim - rank] for x, rank in zip(arrays, ranks, strict=True))
        )
        several = (jnp.broadcast_to(x, leading + y) for x, y in zip(arrays, own, strict=True))
        several = (x.reshape(-1, *y) for x, y in zip(several, own, strict=True))
        results = jax.vmap(f)(*several)
        return jax.tree.map(lambda y: y.reshape(*leading, *y.shape[1:]), results)

    return mapped
