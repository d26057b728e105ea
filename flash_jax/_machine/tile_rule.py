"""Which tiles are fastest here: one rule from the caches, the cores and the shapes.

XLA:CPU runs each operation of a step on all cores and waits for them all, and its matmul library
packs the key tile anew in every step. Both costs are paid per step, so a step should hold as many
scores as the caches bear: about twice the L2 caches of all cores, which the level behind them still
keeps up with. Past 8 MiB the temporaries of a call grow to where malloc hands them back to the
system, and every call pays for fresh pages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .._tiles.axis import BlockSizes
from .processor import Machine

_MAX_SCORE_BYTES = 8 * 2**20
_MAX_BLOCK_Q = 2048
_MAX_BLOCK_KV = 1024
# Up to so many keys, where the maximum meets the difference without a select, XLA's one kernel for
# product, maximum and difference is faster than three operations.
FUSED_KEYS = 256
# What few query rows are: those of one key/value head, each of which costs a pass over a tile of
# values, and those of all heads, of which more would take longer to multiply than the keys to read.
_MOST_ROWS = 8
_MOST_COLUMNS = 64
# Of one kernel per tile: rows of a task, keys that it takes at the most, bytes of all tasks.
_TASK_ROWS = 512
_TASK_KEYS = 4096
_FEWEST_TASKS = 8
_SCORED_KEYS = 2048
_FEWEST_QUERIES = 128
_SCRATCH = 64 * 2**20
# Symbolic lengths get the tiles of this one: a shorter sequence is padded to it.
SYMBOLIC_LENGTH = 256
_STREAMED_KEYS = 512  # per tile, where not all keys are read at once


def few_rows(rows: int, heads: int) -> bool:
    """Whether reading the keys and values takes longer than multiplying them.

    Args:
        rows: rows of scores of one key/value head.
        heads: key/value heads.
    """
    return rows <= _MOST_ROWS and rows * heads <= _MOST_COLUMNS


def score_bytes(machine: Machine) -> int:
    """Bytes of scores that one step should hold."""
    return min(_MAX_SCORE_BYTES, 2 * machine.cores * machine.l2)


class Problem(NamedTuple):
    """What the choice of tiles depends on.

    Attributes:
        T: queries.
        S: keys.
        head_dim: size of a head.
        heads: key/value heads.
        groups: query heads per key/value head; their rows share a tile.
        masked: whether tiles may be partial or skipped.
        reach: how many keys a query may read at the most, where that is known.
        coarse: whether probabilities are rounded relative to the largest in their tile: the
            shorter it is, the finer they are.
        dtype: what is multiplied.
        scored: whether a function of the caller's changes the scores, in one more pass over them.
    """

    T: int
    S: int
    head_dim: int
    heads: int = 1
    groups: int = 1
    masked: bool = False
    reach: int | None = None
    coarse: bool = False
    dtype: str = "float32"
    scored: bool = False


def fastest_blocks(machine: Machine, problem: Problem) -> BlockSizes:
    """Tiles for a problem, by the rule.

    Key tiles grow with the head size, since the work per score does. A masked call wants smaller
    tiles: those that the mask cuts through are partly wasted. Tiles of one axis come out equally
    long.
    """
    T, S, head_dim, heads, groups, masked, reach, coarse, dtype, _ = problem
    T, S = max(T, 1), max(S, 1)
    block_q, block_kv = _MAX_BLOCK_Q, min(_MAX_BLOCK_KV, max(512, _power_of_two(8 * head_dim)))
    if S <= _MAX_BLOCK_KV and not masked:
        block_kv = S  # whole rows need no rescaling
    if masked:
        block_q = min(block_q, max(512, _power_of_two(T // 8)))
        block_kv = min(block_kv, block_q)
    if reach is not None:
        block_kv = min(512, max(128, _power_of_two(reach)))
        block_q = 2 * block_kv
    if few_rows(T * groups, heads) and dtype != "int8":
        # Read where they lie where that is all of them, else in tiles that the caches hold.
        whole = 4 * heads * groups * T * S <= score_bytes(machine)
        return BlockSizes(T, S if whole and not masked else _even(S, _STREAMED_KEYS))
    if coarse:
        # Down to there it costs next to nothing. A masked tile should divide block_q.
        block_kv = min(block_kv, 256 if masked else 192)
    block_kv = _even(S, block_kv)
    most = max(64, score_bytes(machine) // (4 * block_kv * groups))
    return BlockSizes(_even(T, min(block_q, most)), block_kv)


def kernel_blocks(machine: Machine, problem: Problem) -> BlockSizes:
    """Tiles for a problem where a tile is one kernel.

    A kernel is cut into tasks of some 512 rows of one key/value head, whose scores it holds. A step
    should have two tasks per core, and at least eight, but not more rows than that, unless it has
    few keys: the quotient of the softmax is in the kernel where there are so many rows.
    """
    T, S = max(problem.T, 1), max(problem.S, 1)
    most = max(16, min(_TASK_KEYS, _SCRATCH // (4 * _TASK_ROWS * machine.cores)))
    if problem.masked:
        reach = S if problem.reach is None else max(128, _power_of_two(problem.reach))
        block_q = max(_FEWEST_QUERIES, _TASK_ROWS // problem.groups)
        block_kv = min(_TASK_ROWS, 2 * block_q, reach, most)
        return BlockSizes(_even(T, block_q), _even(S, block_kv))
    if problem.dtype != "float32":  # each step brings ones beside the values
        most = max(16, most // 2)
    if problem.scored:  # each pass pays for scores that leave the caches
        most = min(most, _SCORED_KEYS)
    whole = most >= S
    tasks = math.ceil(max(_FEWEST_TASKS, 2 * machine.cores) / problem.heads) * (1 if whole else 2)
    block_q = max(_FEWEST_QUERIES, min(_MAX_BLOCK_Q, _TASK_ROWS * tasks) // problem.groups)
    return BlockSizes(_even(T, block_q), S if whole else _even(S, min(most, _MAX_BLOCK_KV)))


def tiles_within(blocks: BlockSizes) -> BlockSizes:
    """The tiles for a mask that is made of blocks: its blocks, or equal parts of large ones."""
    return BlockSizes(
        *(_even(block, _TASK_ROWS) if block > _TASK_ROWS else block for block in blocks)
    )


def _even(length: int, block: int) -> int:
    """The shortest tile, in whole vectors of 16, that needs no more tiles than ``block`` does."""
    count = max(1, math.ceil(length / block))
    return min(length, 16 * math.ceil(length / count / 16)) or 1


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n, at least 1."""
    return 1 << max(0, n.bit_length() - 1)
