"""A mask that follows parts: all of a query's own part, and landmarks of the others.

A sequence falls into parts with little between them. A query reads the keys of its own part, and of
other parts those near a boundary, where one part passes on to the next: the landmarks. How many
tiles that may be is a density, which the value of the cut gives, or the caller. It is honoured:
tiles are kept in this order until there are as many,

    1. the first tile of each row and those on the diagonal, whatever the density;
    2. tiles of one part, those nearest to the diagonal first;
    3. landmarks, those that score highest first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from .._checks.bind import of_kind
from .._checks.numbers import as_reals, as_scale, check_bool, natural_number, positive_integer
from .._masks.base import Mask
from .._masks.positions import CausalMask
from .._masks.sparse import BlockSparseMask
from .._tiles.axis import BlockSizes
from .affinity import block_affinity
from .budget import keep_best
from .choice import kept_always
from .importance import allowed, pooled
from .mincut import MincutParts, as_affinity, mincut_parts, over_leading_axes
from .signal import MincutSignal, as_labels, next_to_boundary, same_part

MIN_TOKENS = 16  # below these, and below two parts, the mask is dense
MIN_CUT = 30.0

Density = float | Array | Callable[[MincutSignal], Array]


def mincut_mask(
    affinity: ArrayLike,
    T: int,
    block_size: int,
    *,
    parts: MincutParts | ArrayLike | None = None,
    density: Density = MincutSignal.adaptive_density,
    scores: ArrayLike | None = None,
    near: int | None = 1,
    is_causal: bool = True,
    min_cut: float | Array = MIN_CUT,
) -> Mask:
    """The mask of attention that is dense inside parts, and reads landmarks across.

    Query t, in block i = t // block_size, reads key s <= t, in block j, if j = 0, j = i, or tile
    (i, j) is among the kept ones. These are tiles of one part, nearest first, then landmarks: tiles
    of two parts of which both blocks lie next to a boundary, highest scores first; as many in all
    as the density allows. The start of the sequence is a boundary, too.

    All tiles are kept, and the mask is dense, where T < 16, where there are fewer than two parts,
    and where the cut is below ``min_cut``.

    Args:
        affinity: floats (n, n), ([B or 1,] N or K or 1, n, n), >= 0, n = T / block_size rounded up;
            of ``block_affinity``, for example. It may be traced, as may every array here.
        T: how many queries there are, and keys.
        block_size: positions per block.
        parts: of ``mincut_parts``, or labels (..., n), integers: blocks of one label are a part;
            None: those of ``mincut_parts(affinity)``.
        density: how many of the tiles of dense attention to keep, as a share > 0: a number, an
            array (...), or a function of the ``MincutSignal`` that gives one. The count is rounded
            down.
        scores: floats (..., n, n), >= 0: how much block i reads of block j, by which landmarks are
            chosen. Default: the affinity.
        near: how many blocks on either side of a boundary lie next to it; None: all do, so that any
            tile may be a landmark, and the density is reached exactly.
        is_causal: whether query t reads keys s <= t only.
        min_cut: the cut below which the parts are not trusted; 0 trusts all.

    Returns:
        A mask for self-attention over T positions, whose fastest tiles are ``block_size`` x
        ``block_size``.

    Raises:
        ValueError: shapes disagree; affinity or scores has a negative or infinite entry or a NaN; a
            number is out of its range.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> affinity = np.kron(np.eye(2), np.ones((3, 3))) + 0.1
        >>> mask = mincut_mask(affinity, 24, 4, density=0.72)
        >>> block_rows = mask.to_array(24, 24)[3::4, ::4]
        >>> print(block_rows.astype(int))
        [[1 0 0 0 0 0]
         [1 1 0 0 0 0]
         [1 1 1 0 0 0]
         [1 0 0 1 0 0]
         [1 0 0 1 1 0]
         [1 0 0 1 1 1]]
    """
    T, block_size = positive_integer("T", T), positive_integer("block_size", block_size)
    affinity = as_affinity(affinity)
    n = -(-T // block_size)
    if affinity.shape[-1] != n:
        raise ValueError(
            f"affinity must be (..., n, n) with n = T / block_size = {n}, rounded up; its shape is "
            f"{affinity.shape}"
        )
    near = None if near is None else natural_number("near", near)
    is_causal = check_bool("is_causal", is_causal)
    labels = as_labels(mincut_parts(affinity) if parts is None else parts, affinity)
    signal = MincutSignal.of(affinity, labels, near=1 if near is None else near)
    share = checked_density(density(signal) if callable(density) else density)
    scores = affinity if scores is None else as_affinity(scores, "scores")
    if scores.shape[-1] != n:
        raise ValueError(f"scores must be (..., {n}, {n}) as affinity; its shape is {scores.shape}")
    try:
        np.broadcast_shapes(signal.cut_value.shape, scores.shape[:-2], share.shape)
    except ValueError:
        raise ValueError(
            "scores and density must broadcast with affinity but for its last two axes; their "
            f"shapes are {scores.shape} and {share.shape}, that of affinity is {affinity.shape}"
        ) from None
    dense = _is_dense(signal, as_scale("min_cut", min_cut), T < MIN_TOKENS)
    table = mincut_table(labels, scores, share, dense, near, is_causal)
    sparse = BlockSparseMask(table, (block_size, block_size))
    return sparse & CausalMask() if is_causal else sparse


@jax.jit
def _is_dense(signal: MincutSignal, min_cut: ArrayLike, short: ArrayLike) -> Array:
    return (signal.parts < 2) | (signal.cut_value < min_cut) | short


def checked_density(density: Any) -> Array:
    """A density as float32, or an error: where it is known, it must be in (0, 1]."""
    density = as_reals("density", density, positive=True)
    density = of_kind("density", density, "real numbers", (np.integer, jnp.floating))
    if not isinstance(density, Tracer) and np.any(np.asarray(density) > 1):
        raise ValueError(f"density must be at most 1; it is {density}")
    return density.astype(np.float32)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def mincut_table(
    labels: Array,
    scores: Array,
    density: Array,
    dense: Array,
    near: int | None,
    is_causal: bool,
    sinks: int = 1,
    band: int = 1,
) -> Array:
    """Which tiles to keep, bool (..., n, n), in the order that the module's text states.

    Args:
        labels: integers (..., n).
        scores: float32 (..., n, n), >= 0.
        density: float32 (...), the share of tiles to keep; rounded down, but no tile of the first
            kind is left out.
        dense: bool (...), whether to keep all.
        near: blocks on either side of a boundary among which landmarks are; None: all.
        is_causal: whether tiles above the diagonal are none.
        sinks: how many first tiles of a row are kept in any case.
        band: how many tiles from the diagonal on, itself included, are kept in any case.
    """
    n = labels.shape[-1]
    exists = allowed(n, n, BlockSizes(1, 1), is_causal)
    always = exists & kept_always(n, n, BlockSizes(1, 1), is_causal, sinks, band)
    of_one = functools.partial(_table_of_one, near=near, exists=exists, always=always)
    return over_leading_axes(of_one, 1, 2, 0, 0)(labels, scores, density, dense)


def _table_of_one(
    labels: Array,
    scores: Array,
    density: Array,
    dense: Array,
    *,
    near: int | None,
    exists: np.ndarray,
    always: np.ndarray,
) -> Array:
    n = labels.shape[0]
    i, j = (lax.broadcasted_iota(np.int32, (n, n), axis) for axis in (0, 1))
    nearness = 1 - jnp.abs(i - j).astype(np.float32) / n  # in (0, 1]
    highest = jnp.max(scores)
    # Ranks: landmarks in (0, 1], tiles of one part in (1, 2], and what is always kept 3.
    tiny = np.float32(np.finfo(np.float32).tiny)
    rank = jnp.maximum(scores / jnp.where(highest > 0, highest, 1), tiny)
    if near is not None:
        at = next_to_boundary(labels, near)
        rank = jnp.where(at[:, None] & at[None], rank, 0)
    rank = jnp.where(same_part(labels), 1 + nearness, rank)
    rank = jnp.where(exists, jnp.where(always, np.float32(3), rank), 0)
    # One part in a million more: 0.3 of 10 tiles are 3, though float32 has 0.3 a little smaller.
    wanted = jnp.floor(density * np.float32(exists.sum() * (1 + 1e-6)))
    needed, tiles = np.int32(always.sum()), np.int32(exists.sum())
    return keep_best(rank, jnp.clip(wanted.astype(np.int32), needed, tiles)) | (
        dense[None, None] & exists
    )


def mincut_tiles(
    query: Array,
    key: Array,
    block_size: int,
    density: ArrayLike,
    scale: Array,
    is_causal: bool,
    sinks: int = 1,
    band: int = 1,
) -> Array:
    """The tiles that parts and landmarks choose for a call, bool (B, K, n, n).

    Parts are those of all heads together, landmarks those of each key/value head. The density is
    reached exactly: a sequence of one part has a window, and nothing falls back to dense.

    Args:
        query: (B, T, N, H).
        key: (B, T, K, H).
        block_size: positions per block.
        density: the share of tiles to keep, in (0, 1].
        scale: factor on the scores, by which landmarks are chosen.
        is_causal: whether query t reads keys s <= t only.
        sinks: as in ``mincut_table``, and so is band.
    """
    labels = mincut_parts(block_affinity(query, key, block_size)).labels
    scores = pooled(query, key, BlockSizes(block_size, block_size), scale, is_causal)
    share = jnp.asarray(density, np.float32)
    sparse = jnp.full((), False)
    return mincut_table(labels, scores, share, sparse, None, is_causal, sinks, band)
