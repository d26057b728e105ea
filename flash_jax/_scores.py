"""Scores of one tile, from scaled queries and keys to masked logits.

    s = soft_cap(scale * q . k) - slope * |t + offset - s| + bias,  then -inf where masked

which is the order of FlashAttention and of ONNX. Soft cap c: x -> c tanh(x / c), Gemma 2, 2024,
section 2, https://arxiv.org/abs/2408.00118. Slopes: Press et al., ALiBi, 2021, section 3,
https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from ._masks import Mask
from ._online_softmax import dot
from ._query_tile import Axis, QueryTile
from ._schedule import PARTIAL, keep_tile, never_partial, status


class Scores(NamedTuple):
    """What turns products of queries and keys into logits. Each array's first axis is B or 1."""

    scale: Array  # (B,)
    mask: Mask | None = None  # bound
    soft_cap: Array | None = None  # (B,)
    alibi_slopes: Array | None = None  # (B, N)
    offset: Array | None = None  # (B,) int32, of the ALiBi distances
    bias: Array | None = None  # (B, N, T, S), any of them 1

    def always_full(self, kv: Axis) -> bool:
        """Whether it is known before any value is that no tile needs a mask."""
        return never_partial(self.mask, kv) and self.bias is None

    def schedule_row(self, tile: QueryTile) -> Array:
        """What each key tile is, as ``_schedule.status``. A bias may mask anywhere."""
        row = status(self.mask, tile)
        return row if self.bias is None else jnp.minimum(row, np.int32(PARTIAL))

    def scaled(self, tile: QueryTile, q: Array) -> Array:
        """Queries times the scale, in q's dtype.

        Scaled before the product: after it, XLA may fuse ``s * scale - m`` into one rounding, which
        is not 0 at the maximum.
        """
        return q * tile.of_element(self.scale).astype(q.dtype)

    def keep(self, tile: QueryTile, j: Array) -> Array:
        """The mask of key tile j: bool (heads, rows, block_kv)."""
        kept = keep_tile(self.mask, tile, j)
        if self.bias is not None:
            kept = kept & ~jnp.isneginf(tile.of_scores(self.bias, j))
        return tile.as_rows(kept)

    def logits(self, tile: QueryTile, j: Array, q: Array, k: Array) -> Array:
        """Logits (heads, rows, block_kv) of key tile j before the mask.

        Args:
            q: (heads, rows, H) scaled queries.
            k: (heads, block_kv, H) keys.
        """
        s = jax.vmap(lambda q, k: dot(q, k.T))(q, k)
        if self.soft_cap is not None:
            cap = tile.of_element(self.soft_cap).astype(s.dtype)
            s = cap * jnp.tanh(s / cap)
        if self.alibi_slopes is not None and self.offset is not None:
            distance = jnp.abs(tile.t + tile.of_element(self.offset) - tile.s(j)).astype(s.dtype)
            s = s - tile.as_rows(tile.of_heads(self.alibi_slopes).astype(s.dtype) * distance)
        if self.bias is not None:
            s = s + tile.as_rows(tile.of_scores(self.bias, j).astype(s.dtype))
        return s
