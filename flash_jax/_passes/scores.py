"""Scores of one tile, from scaled queries and keys to masked logits.

    s = fn(soft_cap(scale * q . k) - slope * |t + offset - s| + bias),  then -inf where masked

which is the order of FlashAttention and of ONNX, with a function of the caller's at the end
(``score_function``). Soft cap c: x -> c tanh(x / c), Gemma 2, 2024, section 2,
https://arxiv.org/abs/2408.00118. Slopes: Press et al., ALiBi, 2021, section 3,
https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from .._masks.base import Mask
from .._masks.schedule import PARTIAL, keep_tile, never_partial, status
from .._tiles.axis import Axis
from .._tiles.tile import QueryTile
from .._tiles.xla import dot, rounded
from .score_function import ScoreFunction


class Local(NamedTuple):
    """The part of the parameters of scores that one tile depends on."""

    soft_cap: Array | None  # ()
    alibi_slopes: Array | None  # (heads, groups, 1, 1)
    bias: Array | None  # broadcastable to (heads, groups, block_q, block_kv)
    captured: tuple[Array | None, ...] = ()  # by the score function, in their own dtypes


class Scores(NamedTuple):
    """What turns products of queries and keys into logits. Each array's first axis is B or 1."""

    scale: Array  # (B,)
    mask: Mask | None = None  # bound
    soft_cap: Array | None = None  # (B,)
    alibi_slopes: Array | None = None  # (B, N)
    offset: Array | None = None  # (B,) int32, of the ALiBi distances
    bias: Array | None = None  # (B, N, T, S), any of them 1
    function: ScoreFunction | None = None

    @property
    def captured(self) -> tuple[Array | None, ...]:
        """What the score function captures and has derivatives, (B or 1, ...) each."""
        return () if self.function is None else self.function.floats

    @property
    def one_kernel(self) -> bool:
        """Whether one kernel of XLA may hold all that makes logits of products."""
        return self.function is None or self.function.program.one_kernel

    def always_full(self, kv: Axis, fused: bool = False) -> bool:
        """Whether it is known before any value is that no tile needs a mask.

        Args:
            fused: where a score of -inf needs none, for it is found afterwards.
        """
        return never_partial(self.mask, kv) and not self.always_partial(fused)

    def always_partial(self, fused: bool = False) -> bool:
        """Whether every tile needs a mask: bias and function may give -inf anywhere."""
        return self.bias is not None or (self.function is not None and not fused)

    @property
    def alike(self) -> bool:
        """Whether all instances have the same schedule."""
        return self.bias is None and all(x.shape[0] == 1 for x in jax.tree.leaves(self.mask))

    def schedule_row(self, tile: QueryTile, fused: bool = False) -> Array:
        """What each key tile is, as ``_schedule.status``; fused: as ``always_full``."""
        row = status(self.mask, tile)
        return row if not self.always_partial(fused) else jnp.minimum(row, np.int32(PARTIAL))

    def scaled(self, tile: QueryTile, q: Array) -> Array:
        """Queries times the scale, in q's dtype.

        Scaled before the product: after it, XLA may fuse ``s * scale - m`` into one rounding, which
        is not 0 at the maximum.
        """
        return q * tile.of_instance(self.scale).astype(q.dtype)

    def read_keys(self, T: int, S: int) -> Array | None:
        """Which keys some query may read, (B or 1, S), as ``Mask.read_keys``; None: all."""
        read = None if self.mask is None else self.mask.read_keys(T, S)
        if self.bias is None:
            return read
        unmasked = ~jnp.isneginf(self.bias.astype(self.scale.dtype))
        unmasked = jnp.any(unmasked, axis=(1, 2))
        unmasked = jnp.broadcast_to(unmasked, (unmasked.shape[0], S))
        return unmasked if read is None else read & unmasked

    def keep(self, tile: QueryTile, j: Array) -> Array:
        """The mask of key tile j: bool (heads, rows, block_kv)."""
        return tile.as_rows(self.kept(tile, j))

    def kept(self, tile: QueryTile, j: Array) -> Array:
        """The mask of key tile j: bool, broadcastable to ``tile.shape()``."""
        kept = keep_tile(self.mask, tile, j)
        if self.bias is not None:
            bias = tile.of_scores(self.bias, j).astype(self.scale.dtype)
            kept = kept & ~jnp.isneginf(bias)
        return kept

    def kept_logits(self, kept: Array, s: Array) -> Array:
        """The mask kept, where it is not -inf by the score function that logits are masked."""
        return kept if self.function is None else kept & ~jnp.isneginf(s)

    def kept_pairs(self, tile: QueryTile, j: Array, products: Callable[[Array], Array]) -> Array:
        """As ``keep``, without pairs that the score function hides.

        Args:
            products: of key tile j.
        """
        kept = self.keep(tile, j)
        if self.function is None:
            return kept
        return self.kept_logits(kept, self.own_logits(tile, j, products(j)))

    def products(self, q: Array, k: Array) -> Array:
        """Scaled queries (heads, rows, H) times keys (heads, block_kv, H)."""
        s = dot(q, k, axis=-1)
        return rounded(s) if q.shape[-1] == 1 else s  # XLA makes that a plain product

    def local(self, tile: QueryTile, j: Array) -> Local:
        """The parameters that the logits of key tile j depend on."""
        return Local(
            None if self.soft_cap is None else tile.of_instance(self.soft_cap),
            None if self.alibi_slopes is None else tile.of_heads(self.alibi_slopes),
            None if self.bias is None else tile.of_scores(self.bias, j),
            tuple(None if x is None else tile.of_instance(x) for x in self.captured),
        )

    def own_logits(self, tile: QueryTile, j: Array, s: Array, fused: bool = False) -> Array:
        """``logits`` with the parameters that they have on the tile."""
        return self.logits(tile, j, self.local(tile, j), s, fused)

    def logits(
        self, tile: QueryTile, j: Array, local: Local, s: Array, fused: bool = False
    ) -> Array:
        """What the products s (heads, rows, block_kv) of key tile j become before the mask.

        Args:
            fused: of operations that XLA's library has, for one kernel per tile.
        """
        *parameters, captured = local
        soft_cap, slopes, bias = jax.tree.map(lambda x: x.astype(s.dtype), parameters)
        if soft_cap is not None:
            # A constant cap would divide by its reciprocal, and give other bits than a traced one.
            s = soft_cap * jnp.tanh(s * (1 / soft_cap))
            s = s if fused else rounded(s)
        if slopes is not None and self.offset is not None:
            distance = jnp.abs(tile.t + tile.of_instance(self.offset) - tile.s(j)).astype(s.dtype)
            s = s - tile.as_rows(slopes * distance)
        if bias is not None:
            s = s + tile.as_rows(bias)
        if self.function is None:
            return s
        if bias is not None and not fused:  # the slope at -inf, times 0, may be NaN
            s = jnp.where(jnp.isneginf(s), 1, s)
        return self.function.on_tile(tile, j, captured, s, fused)
