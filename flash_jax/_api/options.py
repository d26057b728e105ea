"""The options of attention in models: checked, then bound as one mask and one rule for the scores.

An option that may be traced is a field of ``Arrays``; one that is compiled in, of ``Options``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
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
from .._machine.processor import Machine, machine
from .._machine.tile_rule import SYMBOLIC_LENGTH, Problem, kernel_blocks, tiles_within
from .._machine.tuned import best_blocks, tuned
from .._masks.arrays import ArrayMask
from .._masks.base import Mask
from .._masks.positions import CausalMask, LengthMask, WindowMask
from .._masks.segments import segments
from .._passes.dropout import bind_key
from .._passes.score_function import ScoreFunction, score_function
from .._passes.scores import Scores
from .._tiles.axis import BlockSizes
from .._tiles.symbolic import known

# fn(score, b, h, q_index, k_index) -> score
ScoreMod = Callable[[Array, Array, Array, Array, Array], Array]

# The axes of these options; each may have B in front.
_INTEGERS = {
    "query_seq_lengths": "",
    "key_value_seq_lengths": "",
    "query_offset": "",
    "query_segment_ids": "T",
    "key_value_segment_ids": "S",
}
_REALS = {"scale": "", "logits_soft_cap": "", "sinks": "N", "alibi_slopes": "N"}


class Arrays(NamedTuple):
    """The options that may be traced, as a pytree. None: not given."""

    bias: Any = None
    mask: Any = None  # an array or a Mask
    scale: Any = None
    query_seq_lengths: Any = None
    key_value_seq_lengths: Any = None
    query_offset: Any = 0
    query_segment_ids: Any = None
    key_value_segment_ids: Any = None
    logits_soft_cap: Any = None
    sinks: Any = None
    alibi_slopes: Any = None
    dropout_rng: Any = None
    score_mod: ScoreFunction | None = None

    def checked(self) -> Arrays:
        """Checks what needs no shapes. Lists become arrays, before ``jit`` takes them apart."""
        return Arrays(*map(_checked, self._fields, self))

    def bound(self, sizes: Sizes, dtype: np.dtype) -> Arrays:
        """Arrays that fit ``sizes``, whose first axis is B or 1. Real numbers get the dtype."""
        bind = functools.partial(_bound, sizes=sizes, dtype=dtype)
        return Arrays(*map(bind, self._fields, self))


def _checked(name: str, x: Any) -> Any:
    if name in ("dropout_rng", "score_mod") or (name == "mask" and isinstance(x, Mask)):
        return x
    if name == "query_offset" and x is None:
        raise TypeError("query_offset must be an integer or an array of them; it is None")
    if name in ("scale", "logits_soft_cap"):
        return as_reals(name, x, positive=name == "logits_soft_cap")
    x = as_option(name, x)
    if name != "mask":
        check_integers(name, x)
    return x


def _bound(name: str, x: Any, sizes: Sizes, dtype: np.dtype) -> Any:
    if x is None or name == "dropout_rng":
        return x
    if name == "score_mod":
        return x.bound()
    if name == "mask":
        return (x if isinstance(x, Mask) else ArrayMask(x)).bind(sizes)
    if name == "bias":
        return bind_scores(name, x, "floats", jnp.floating, sizes)
    if name in _INTEGERS:
        return bind_integers(name, x, _INTEGERS[name], sizes)
    return bind_reals(name, x, _REALS[name], sizes).astype(dtype)


class Options(NamedTuple):
    """The options that are compiled in."""

    is_causal: bool
    window: tuple[int | None, int | None] | None
    blocks: BlockSizes | None
    machine: Machine
    batched: bool = True  # False: the call has no batch axis, and its arrays must have none
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False  # False where nothing is dropped
    probabilities: np.dtype | None = None  # what int8 products take them as; None: of floats
    lse: bool = True  # False: the output alone is asked for
    tuned: int = 0  # state of the tuned tiles: a call after a ``tune`` is traced anew

    def problem(self, query: Any, key: Any, masked: bool, scored: bool = False) -> Problem:
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
        return Problem(T, S, H, heads, groups, masked, reach, coarse, dtype, scored)


class Bound(NamedTuple):
    """The options as the primitives take them."""

    scores: Scores
    sinks: Array | None  # (B or 1, N)
    dropout_key: Array | None  # (B or 1, 2)
    blocks: BlockSizes  # of the exact loop
    kernel: BlockSizes  # of the kernels, where there are any
    problem: Problem  # what tiles depend on
    given: BlockSizes | None  # tiles of the caller, or of a mask that is made of blocks


def as_score_mod(fn: Any, dtype: Any) -> ScoreFunction | None:
    """A score function for scores of queries, or of a cache, of a dtype; None stays None."""
    floats = jnp.issubdtype(dtype, jnp.floating)
    return score_function("score_mod", fn, accumulator(dtype) if floats else np.dtype(np.float32))


def check_options(
    query: Array, is_causal: Any, local_window_size: Any, block_sizes: Any
) -> Options:
    """Checks the options that every function has and that are compiled in."""
    return Options(
        is_causal=check_bool("is_causal", is_causal),
        window=check_window("local_window_size", local_window_size),
        blocks=None if block_sizes is None else as_block_sizes(block_sizes),
        batched=query.ndim == 4,
        machine=machine(),
        tuned=tuned() if block_sizes is None else 0,
    )


def bind_options(arrays: Arrays, options: Options, query: Any, key: Any, devices: int = 1) -> Bound:
    """Checks that options fit query (B, T, N, H) and key (B, S, K, H), and binds them to these.

    Args:
        devices: how many a ring has.
    """
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    acc = accumulator(query.dtype)
    arrays = arrays.bound(Sizes(B, N, T, S, options.batched, K, devices), acc)
    scores = Scores(
        scale=jnp.full((1,), 1 / math.sqrt(H), acc) if arrays.scale is None else arrays.scale,
        mask=one_mask(arrays, options),
        soft_cap=arrays.logits_soft_cap,
        alibi_slopes=arrays.alibi_slopes,
        offset=arrays.query_offset,
        bias=arrays.bias,
        function=arrays.score_mod,
    )
    dropout_key = None
    if options.dropout_rate and arrays.dropout_rng is not None:
        dropout_key = bind_key(arrays.dropout_rng, 1 if options.broadcast_dropout else B)
    problem = options.problem(query, key, scores.mask is not None, scores.function is not None)
    given = options.blocks
    if given is None and scores.mask is not None and scores.mask.blocks is not None:
        given = tiles_within(scores.mask.blocks)
    return Bound(scores, arrays.sinks, dropout_key, *tiles(given, problem), problem, given)


def tiles(blocks: BlockSizes | None, problem: Problem | None) -> tuple[BlockSizes, BlockSizes]:
    """Tiles of the exact loop and of the kernels: ``blocks``, or else the best for a problem."""
    if blocks is not None:
        return blocks, blocks
    assert problem is not None
    return best_blocks(problem), best_blocks(problem, kernel_blocks)


def one_mask(bound: Arrays, options: Options) -> Mask | None:
    """The masking options as one bound mask; None where there are none."""
    masks: list[Mask] = []
    if options.is_causal:
        masks.append(CausalMask(bound.query_offset))
    if options.window is not None:
        masks.append(WindowMask(*options.window, bound.query_offset))
    lengths = bound.query_seq_lengths, bound.key_value_seq_lengths
    if any(x is not None for x in lengths):
        masks.append(LengthMask(*lengths))
    q_ids, kv_ids = bound.query_segment_ids, bound.key_value_segment_ids
    if (q_ids is None) != (kv_ids is None):
        given, missing = "query_segment_ids", "key_value_segment_ids"
        given, missing = (given, missing) if kv_ids is None else (missing, given)
        raise ValueError(f"{missing} must be given where {given} is")
    if q_ids is not None:
        masks.append(segments(q_ids, kv_ids))
    if bound.mask is not None:
        masks.append(bound.mask)
    return functools.reduce(operator.and_, masks) if masks else None
