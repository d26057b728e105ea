"""The configuration of the kernels: tile sizes, head size, mask and scale."""

from __future__ import annotations

import dataclasses
import math
import numbers

from .._checks.numbers import as_reals, positive_integer
from .._machine.tile_rule import Problem
from .._machine.tuned import best_blocks
from .._tiles.axis import BlockSizes


@dataclasses.dataclass(frozen=True)
class FlashAttentionConfig:
    """Configuration of the kernels. Frozen and hashable: pass it as a static argument.

    Attributes:
        block_size_q: queries per tile, > 0. Need not divide T; a longer tile is cut to T.
        block_size_kv: keys per tile, > 0. Need not divide S; a longer tile is cut to S.
        head_dim: H of queries and keys, > 0.
        causal: query t reads keys 0..t.
        softmax_scale: factor on the logits, finite and > 0; default ``1 / sqrt(head_dim)``.

    Raises:
        ValueError: a field is out of range; the message names it.
        TypeError: a field is not an integer, bool or real number.

    Example:
        >>> FlashAttentionConfig.for_head_dim(64, causal=True).block_sizes
        BlockSizes(q=64, kv=64)
    """

    block_size_q: int
    block_size_kv: int
    head_dim: int
    causal: bool = False
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("block_size_q", "block_size_kv", "head_dim"):
            object.__setattr__(self, name, positive_integer(name, getattr(self, name)))
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be a bool; it is {self.causal!r}")
        scale = 1 / math.sqrt(self.head_dim) if self.softmax_scale is None else self.softmax_scale
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
            raise TypeError(f"softmax_scale must be a real number or None; it is {scale!r}")
        scale = as_reals("softmax_scale", scale, positive=True)
        object.__setattr__(self, "softmax_scale", float(scale))

    @property
    def block_sizes(self) -> BlockSizes:
        """Positions per tile, of queries and of keys."""
        return BlockSizes(self.block_size_q, self.block_size_kv)

    @property
    def scale(self) -> float:
        """``softmax_scale``, which is a number once the fields are checked."""
        assert self.softmax_scale is not None
        return self.softmax_scale

    @classmethod
    def for_head_dim(
        cls, head_dim: int, *, causal: bool = False, softmax_scale: float | None = None
    ) -> FlashAttentionConfig:
        """64 x 64 tiles.

        Example:
            >>> FlashAttentionConfig.for_head_dim(64).softmax_scale
            0.125
        """
        return cls(64, 64, head_dim, causal, softmax_scale)

    @classmethod
    def for_long_sequence(
        cls, head_dim: int, *, causal: bool = False, softmax_scale: float | None = None
    ) -> FlashAttentionConfig:
        """32 x 128 tiles.

        Example:
            >>> FlashAttentionConfig.for_long_sequence(64).block_sizes
            BlockSizes(q=32, kv=128)
        """
        return cls(32, 128, head_dim, causal, softmax_scale)

    @classmethod
    def auto(
        cls,
        head_dim: int,
        seq_len_q: int,
        seq_len_kv: int,
        *,
        causal: bool = False,
        softmax_scale: float | None = None,
        int8: bool = False,
    ) -> FlashAttentionConfig:
        """The tiles that are fastest on this machine for T = seq_len_q and S = seq_len_kv.

        ``int8`` asks for the tiles of the int8 kernels: shorter tiles of keys make uint8
        probabilities finer. The tiles are those that ``tune`` found. Otherwise they follow from the
        number of cores and the size of their L2 caches, which is taken to be 1 MiB where it can't
        be read. ``python -m flash_jax info`` shows what was found.

        Example:
            >>> config = FlashAttentionConfig.auto(64, seq_len_q=1000, seq_len_kv=1000, causal=True)
            >>> config.head_dim, config.causal
            (64, True)
        """
        head_dim = positive_integer("head_dim", head_dim)
        T = positive_integer("seq_len_q", seq_len_q)
        S = positive_integer("seq_len_kv", seq_len_kv)
        dtype = "int8" if int8 else "float32"
        problem = Problem(T, S, head_dim, masked=causal, coarse=int8, dtype=dtype)
        blocks = best_blocks(problem)
        return cls(*blocks, head_dim, causal, softmax_scale)
