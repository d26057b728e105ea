"""Tables of blocks of scores: checked, and given the axes B and N."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.axis import BlockSizes
from .bind import Sizes, of_kind
from .numbers import as_option


def bind_table(name: str, table: Any, blocks: BlockSizes, sizes: Sizes) -> Array:
    """table with all its axes, (B or 1, N or K or 1, T / block_q, S / block_kv)."""
    table = of_kind(name, table, "bool", np.bool_)
    shape = (1,) * (4 - table.ndim) + table.shape
    T, S = (None if x is None else x * sizes.devices for x in (sizes.T, sizes.S))
    rows, columns = (
        None if x is None else -(-x // block) for x, block in zip((T, S), blocks, strict=True)
    )
    heads = 1, sizes.N, sizes.K
    fits = table.ndim in (2, 3, 4) and all(
        wanted is None or n == wanted for n, wanted in zip(shape[2:], (rows, columns), strict=True)
    )
    fits = fits and (sizes.B is None or shape[0] in (1, sizes.B))
    if not fits or not (sizes.N is None or shape[1] in heads):
        wanted = f"([B or 1, N or K or 1,] T / {blocks[0]}, S / {blocks[1]})"
        found = f"([{sizes.B}, {sizes.N} or {sizes.K},] {rows}, {columns})"
        raise ValueError(
            f"{name} must be {wanted} = {found}, rounded up; its shape is {table.shape}"
        )
    return table.reshape(shape)


def check_lists(name: str, indices: Any, counts: Any, key_blocks: int) -> Array:
    """indices (..., rows, M) int32, those that count in order and once each, and -1 behind them."""
    indices, counts = (
        as_option(f"{name}{x}", y) for x, y in (("indices", indices), ("counts", counts))
    )
    known_values = all(isinstance(x, np.ndarray) for x in (indices, counts))
    found, many = indices, counts
    indices = of_kind(f"{name}indices", indices, "integers", np.integer)
    counts = of_kind(f"{name}counts", counts, "integers", np.integer)
    if indices.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name}indices must be (..., T / block_q, M); its shape is {indices.shape}"
        )
    if counts.shape != indices.shape[:-1]:
        raise ValueError(
            f"{name}counts must be {indices.shape[:-1]}, as indices without its last axis; its "
            f"shape is {counts.shape}"
        )
    if known_values:
        counted = found[np.arange(found.shape[-1]) < many[..., None]]
        wrong = counted[(counted < 0) | (counted >= key_blocks)]
        if wrong.size:
            raise ValueError(f"{name}indices must be in 0..{key_blocks - 1}; one is {wrong[0]}")
    place = lax.broadcasted_iota(np.int32, indices.shape, counts.ndim)
    counted = place < counts[..., None].astype(np.int32)
    counted &= (indices >= 0) & (indices < key_blocks)
    beyond = np.int32(key_blocks)
    ordered = jnp.sort(jnp.where(counted, indices.astype(np.int32), beyond), axis=-1)
    again = jnp.concatenate(
        [jnp.zeros_like(counted[..., :1]), ordered[..., 1:] == ordered[..., :-1]], axis=-1
    )
    ordered = jnp.sort(jnp.where(again, beyond, ordered), axis=-1)
    return jnp.where(ordered < beyond, ordered, np.int32(-1))


def per_query_head(table: Array, sizes: Sizes) -> Array:
    """table (B or 1, N or K or 1, ...) with the axis N or 1: key/value heads serve their groups."""
    heads = table.shape[1]
    if sizes.N is None or heads in (1, sizes.N):
        return table
    return jnp.repeat(table, sizes.N // heads, axis=1)
