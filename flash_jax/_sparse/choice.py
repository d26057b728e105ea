"""From the importance of blocks to a table of those that are kept."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from .._tiles.axis import BlockSizes
from .importance import allowed


def chosen(
    importance: Array,
    T: int,
    S: int,
    blocks: BlockSizes,
    is_causal: bool,
    sinks: int,
    band: int,
    density: float | None,
    top_p: float | None,
) -> Array:
    """The table (..., T / block_q, S / block_kv) of the most important blocks of each row.

    Args:
        importance: (..., T / block_q, S / block_kv), at least 0.
        sinks: how many first blocks of keys are kept in any case.
        band: how many blocks from the diagonal on, itself included, are kept in any case.
        density: the share of the blocks of a row that is kept, rounded up.
        top_p: instead, the share of the importance of a row that is kept at least.
    """
    may, always = (
        np.expand_dims(x, tuple(range(importance.ndim - 2)))
        for x in (
            allowed(T, S, blocks, is_causal),
            kept_always(T, S, blocks, is_causal, sinks, band),
        )
    )
    worth = jnp.where(always, np.float32(np.inf), jnp.nan_to_num(importance))
    order = jnp.argsort(jnp.where(may, -worth, np.float32(np.inf)), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    if density is not None:
        # Less a little: 0.1 * 30 is above 3 in float64.
        count = np.ceil(np.sum(may, axis=-1) * density - 1e-6).astype(np.int32)
        kept = rank < count[..., None]
    else:
        assert top_p is not None
        ordered = jnp.take_along_axis(jnp.where(may, importance, 0), order, axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        total = jnp.sum(ordered, axis=-1, keepdims=True)
        kept = jnp.take_along_axis(before < top_p * total, rank, axis=-1) | (top_p == 1)
    return (kept | always) & may


def kept_always(
    T: int, S: int, blocks: BlockSizes, is_causal: bool, sinks: int, band: int
) -> np.ndarray:
    """The first blocks of keys, and those within ``band`` of the diagonal: bool, as the table."""
    rows, columns = (-(-n // block) for n, block in zip((T, S), blocks, strict=True))
    first = np.arange(rows) * blocks.q
    last = np.minimum(first + blocks.q, T) - 1
    column, reach = np.arange(columns), band - 1
    low, high = first // blocks.kv - reach, last // blocks.kv + (0 if is_causal else reach)
    near = (column >= low[:, None]) & (column <= high[:, None]) & (band > 0)
    return near | (column < sinks)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def share(table: Array, T: int, S: int, blocks: BlockSizes, is_causal: bool) -> Array:
    """Which share of the blocks that may be read a table keeps, a float32."""
    may = np.expand_dims(allowed(T, S, blocks, is_causal), tuple(range(table.ndim - 2)))
    return jnp.mean(table & may, dtype=np.float32) * np.float32(may.size / np.sum(may))
