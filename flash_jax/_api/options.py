"""Options of model-level attention: checked, then bound as one mask and one rule for the scores."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax import numpy as jnp

from .._checks.bind import Sizes, bind_integers, bind_reals, bind_scores
from .._checks.numbers import (
    as_block_sizes,
    as_option,
    as_reals,
    check_bool,
    check_integers,
    check_window,
)
from .._checks.shapes import accumulator
from .._machine.tile_rule import SYMBOLIC_LENGTH, Problem
from .._machine.tuned import best_blocks, tuned
from .._masks.arrays import ArrayMask
from .._masks.base import Mask
from .._masks.positions import CausalMask, LengthMask, WindowMask
from .._masks.segments import segments
from .._passes.scores import Scores
from .._tiles.symbolic import known
from .._tiles.tile import BlockSizes

_REALS = "scale", "logits_soft_cap"


class Options(NamedTuple):
    """The options that are compiled in."""

    is_causal: bool
    window: tuple[int | None, int | None] | None
    blocks: BlockSizes | None
    probabilities: np.dtype | None = None  # what int8 products take them as; None: of floats
    tuned: int = 0  # state of the tuned tiles: a call after a ``tune`` is traced anew

    def problem(self, query: Any, key: Any, masked: bool) -> Problem:
        """What the choice of tiles for query (..., T, N, H) and key (..., S, K, H) depends on."""
        (T, N, H), (S, K) = query.shape[-3:], key.shape[-3:-1]
        T, S = (size if known(size) else SYMBOLIC_LENGTH for size in (T, S))
        reach = None
        if self.window is not None:
            left, right = self.window
            right = 0 if self.is_causal else right
            reach = None if left is None or right is None else left + right + 1
        dtype = query.dtype.name if self.probabilities is None else "int8"
        coarse = self.probabilities == np.uint8
        heads, groups = max(K, 1), max(1, N // max(K, 1))
        return Problem(T, S, H, heads, groups, masked, reach, coarse, dtype)


class Bound(NamedTuple):
    """The options as the primitives take them."""

    scores: Scores
    sinks: Array | None  # (B or 1, N)
    blocks: BlockSizes


def check_options(
    arrays: dict[str, Any], mask: Any, is_causal: Any, local_window_size: Any, block_sizes: Any
) -> Options:
    """Checks what needs no shapes.

    Args:
        arrays: the options that may be traced, by name. Lists among them are replaced by arrays.
    """
    if arrays["query_offset"] is None:
        raise TypeError("query_offset must be an integer or an array of them; it is None")
    for name, x in arrays.items():
        if name in _REALS:
            arrays[name] = as_reals(name, x, positive=name == "logits_soft_cap")
        else:
            arrays[name] = as_option(name, x)
            check_integers(name, arrays[name])
    as_mask(mask)
    return Options(
        is_causal=check_bool("is_causal", is_causal),
        window=check_window("local_window_size", local_window_size),
        blocks=None if block_sizes is None else as_block_sizes(block_sizes),
        tuned=tuned() if block_sizes is None else 0,
    )


def as_mask(mask: Any) -> Any:
    """A ``Mask``, an array or None; lists become an array before ``jit`` takes them apart."""
    return mask if isinstance(mask, Mask) else as_option("mask", mask)


def bind_options(
    mask: Mask | Array | None,
    arrays: dict[str, Any],
    options: Options,
    query: Any,
    key: Any,
    batched: bool,
) -> Bound:
    """Options that fit query (B, T, N, H) and key (B, S, K, H); batched: not without B."""
    (B, T, N, H), S = query.shape, key.shape[1]
    sizes, acc = Sizes(B, N, T, S, batched), accumulator(query.dtype)

    def real(name: str, axes: str) -> Array | None:
        x = arrays[name]
        return None if x is None else bind_reals(name, x, axes, sizes).astype(acc)

    scale, bias = real("scale", ""), arrays["bias"]
    scores = Scores(
        scale=jnp.full((1,), 1 / math.sqrt(H), acc) if scale is None else scale,
        mask=_one_mask(mask, arrays, options, sizes),
        soft_cap=real("logits_soft_cap", ""),
        alibi_slopes=real("alibi_slopes", "N"),
        offset=bind_integers("query_offset", arrays["query_offset"], "", sizes),
        bias=None if bias is None else bind_scores("bias", bias, "floats", jnp.floating, sizes),
    )
    blocks = options.blocks
    if blocks is None:
        masked = scores.mask is not None
        blocks = best_blocks(options.problem(query, key, masked))
    return Bound(scores, real("sinks", "N"), blocks)


def _one_mask(
    mask: Mask | Array | None, arrays: dict[str, Any], options: Options, sizes: Sizes
) -> Mask | None:
    """The masking options as one bound mask."""

    def integers(name: str, axes: str) -> Array | None:
        x = arrays[name]
        return None if x is None else bind_integers(name, x, axes, sizes)

    masks: list[Mask] = []
    offset = bind_integers("query_offset", arrays["query_offset"], "", sizes)
    if options.is_causal:
        masks.append(CausalMask(offset))
    if options.window is not None:
        masks.append(WindowMask(*options.window, offset))
    lengths = [integers(name, "") for name in ("query_seq_lengths", "key_value_seq_lengths")]
    if lengths != [None, None]:
        masks.append(LengthMask(*lengths))
    q_ids = integers("query_segment_ids", "T")
    kv_ids = integers("key_value_segment_ids", "S")
    if (q_ids is None) != (kv_ids is None):
        given, missing = "query_segment_ids", "key_value_segment_ids"
        given, missing = (given, missing) if kv_ids is None else (missing, given)
        raise ValueError(f"{missing} must be given where {given} is")
    if q_ids is not None and kv_ids is not None:
        masks.append(segments(q_ids, kv_ids))
    if isinstance(mask, Mask):
        masks.append(mask.bind(sizes))
    elif mask is not None:
        masks.append(ArrayMask(mask).bind(sizes))
    return functools.reduce(operator.and_, masks) if masks else None
