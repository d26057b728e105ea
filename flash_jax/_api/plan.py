"""What a call is compiled as: the one place where layouts, steps and the number format are decided.

The passes look nothing up: what depends on the machine and on the shapes is decided here, and
carried by the ``Plan``. Tiles are chosen before, by the rule or by ``tune`` (``_machine.tuned``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax import numpy as jnp

from .._checks.shapes import accumulator
from .._formats.bytes_in_place import BytesInPlace
from .._formats.columns import Columns
from .._formats.few_rows import FewRows
from .._formats.floats import Floats
from .._formats.in_place import InPlace
from .._formats.int8 import MOST_SUMMED, Int8
from .._machine.processor import Machine
from .._machine.tile_rule import FUSED_KEYS, few_rows, score_bytes
from .._passes.plan import Part, Plan
from .._passes.walk import heads_per_step
from .._tiles.axis import Axis, BlockSizes
from .._tiles.layout import Layout
from .._tiles.symbolic import known

# In a step: XLA's library does not take operations with fewer elements than 4,096, and where there
# are few scores one more way of computing them is not worth its time to compile.
FEWEST_SCORES = 2**16
MOST_FEW = 16  # queries that are multiplied with a cache at once
FEW_BYTES = 2**20  # of a tile of keys, which is copied: it stays in the cache


def plan_floats(
    query: Any,
    key: Any,
    blocks: BlockSizes,
    layout: Layout,
    here: Machine,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = False,
    kernel: BlockSizes | None = None,
    lse: bool = True,
    part: Part | None = None,
    kv_layout: Layout | None = None,
) -> Plan:
    """The plan for floats.

    Args:
        query: with a batch axis, laid out as ``layout`` says.
        key: alike.
        here: the machine that the call is compiled for.
        dropout_rate: in [0, 1).
        broadcast_dropout: whether all heads drop the same.
        kernel: positions per tile, where a tile is one kernel.
        lse: whether it is asked for.
        part: makes the plans of parts of the call.
        kv_layout: where the positions of keys and values lie, if that is settled.
    """
    B, N, T, H = layout.sizes(query)
    _, K, S, _ = layout.sizes(key)
    # A kernel has no product of size 1, no float64, and no sum beside dropped probabilities.
    if H == 1 or query.dtype == np.float64 or dropout_rate:
        kernel = None
    kernel = _tiles_of_kernels(here, kernel, B, N, T, S)
    if kv_layout is None:
        # Keys that are read more than once come into order by head first.
        at_once = blocks.q if kernel is None else min(blocks.q, kernel.q)
        kv_layout = layout if known(T) and at_once >= T else Layout.HEADS_FIRST
    dtype = _multiplied(query.dtype, here)
    q, kv, step_scores = Axis.of(T, blocks.q), Axis.of(S, blocks.kv), score_bytes(here) // 4
    number_format, columns = Floats(dtype), False
    if kv_layout is Layout.HEADS_LAST and 0 not in (K, T, S):
        rows = N // K * q.block
        if few_rows(rows, heads_per_step(step_scores, K, rows * kv.block)):
            number_format = FewRows(dtype)
            columns = dtype == jnp.bfloat16 and few_rows(rows, K) and not dropout_rate
    if not isinstance(number_format, Floats):
        kernel = None
    plan = Plan(
        blocks=blocks,
        layout=layout,
        kv_layout=kv_layout,
        elements=B,
        dtype=np.dtype(query.dtype),
        format=number_format,
        step_scores=step_scores,
        cores=here.cores,
        fused=kv.block <= FUSED_KEYS,
        kernel=kernel,
        multiplied=None if kernel is None else dtype,
        lse=lse,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        part=part,
    )
    return _with_few(plan, Columns(), key, K) if columns and all(map(known, (B, S))) else plan


def _tiles_of_kernels(
    here: Machine, kernel: BlockSizes | None, B: Any, N: Any, T: Any, S: Any
) -> BlockSizes | None:
    """``kernel`` where XLA makes one kernel of a tile, and where that pays; else None."""
    if kernel is None or not here.one_kernel or not all(map(known, (B, T, S))):
        return None
    enough = B * N * min(T, kernel.q) * min(S, kernel.kv) >= FEWEST_SCORES
    return kernel if enough else None


def plan_int8(
    query: Any,
    S: Any,
    blocks: BlockSizes,
    layout: Layout,
    dtype: np.dtype,
    here: Machine,
    probabilities: np.dtype,
    kernel: BlockSizes | None = None,
    lse: bool = True,
    part: Part | None = None,
) -> Plan:
    """The plan for integers.

    Args:
        query: with a batch axis, laid out as ``layout`` says.
        S: keys.
        dtype: of the output.
        here: the machine that the call is compiled for.
        probabilities: what they are rounded to.
        kernel: positions per tile, where a tile is one kernel.
        lse: whether it is asked for.
        part: makes the plans of parts of the call.
    """
    B, N, T, H = layout.sizes(query)
    # Kernels multiply bytes as bfloat16, and sum up to 1,024 products of 128 by 127 without error.
    if not here.bfloat16 or H not in range(2, 1025):
        kernel = None
    return Plan(
        blocks=blocks,
        layout=layout,
        kv_layout=Layout.HEADS_FIRST,
        elements=B,
        dtype=dtype,
        format=Int8(probabilities),
        step_scores=score_bytes(here) // 4,
        cores=here.cores,
        kernel=_tiles_of_kernels(here, kernel, B, N, T, S),
        lse=lse,
        fused=Axis.of(S, blocks.kv).block <= FUSED_KEYS,
        part=part,
    )


def reads_in_place(query: Any, dtype: Any, S: Any) -> bool:
    """Whether query (B, T, N, H) is multiplied with all S keys of a cache of that dtype at once.

    Few rows take less time than reading the keys, which tiles of them copy.
    """
    B, T = query.shape[:2]
    if not all(map(known, (B, T, S))):
        return False
    return T <= MOST_FEW and (dtype != np.int8 or S <= MOST_SUMMED)


def plan_cached(
    query: Any, keys: Any, page_size: int | None, bound: Any, here: Machine, lse: bool, few: bool
) -> Plan:
    """The plan for keys and values of a cache, heads first.

    Args:
        query: (B, T, N, H).
        keys: (1, K, S, H), what a row has.
        page_size: of keys in pages; None: they lie in one piece.
        bound: the options, and the tiles of both ways.
        here: the machine that the call is compiled for.
        lse: whether it is asked for.
        few: as ``reads_in_place``.
    """
    T, (_, K, S, H) = query.shape[1], keys.shape
    blocks, kernel, dtype = bound.blocks, bound.kernel, np.dtype(query.dtype)
    if page_size is not None:
        blocks, kernel = (_in_pages(tile, page_size) for tile in (blocks, kernel))
    kernel = None if few else kernel
    if keys.dtype == np.int8:
        # With a scale per value, probabilities are rounded to bfloat16, or not at all.
        probabilities = np.dtype(jnp.bfloat16 if here.bfloat16 else np.float32)
        layout = Layout.HEADS_LAST
        plan = plan_int8(query, S, blocks, layout, dtype, here, probabilities, kernel, lse)
        number_format: Any = BytesInPlace()
    else:
        key = np.broadcast_to(np.int8(0), (1, S, K, H))
        plan = plan_floats(query, key, blocks, Layout.HEADS_LAST, here, kernel=kernel, lse=lse)
        multiplied = _multiplied(dtype, here)
        plan = dataclasses.replace(plan, kv_layout=Layout.HEADS_FIRST, format=Floats(multiplied))
        number_format = InPlace(multiplied)
    if not few:
        return plan
    plan = _with_few(plan, number_format, keys, K)
    if page_size is None:
        return plan
    part = _in_pages(BlockSizes(T, plan.few_keys), page_size)
    return dataclasses.replace(plan, few_keys=part.kv)


def _in_pages(blocks: BlockSizes, size: int) -> BlockSizes:
    """The same tiles, with keys of whole pages, one at least."""
    return BlockSizes(blocks.q, max(1, blocks.kv // size) * size)


def _with_few(plan: Plan, number_format: Any, keys: Any, K: int) -> Plan:
    """The plan of few query rows, with the tiles for where part of the keys is read."""
    row = K * keys.shape[3] * keys.dtype.itemsize
    part = max(64, min(1024, FEW_BYTES // (plan.elements * row)) // 64 * 64)
    return dataclasses.replace(plan, few=number_format, few_keys=part)


def _multiplied(dtype: Any, here: Machine) -> np.dtype:
    """What numbers of a dtype are multiplied as."""
    if dtype == jnp.bfloat16 and here.bfloat16:
        return np.dtype(jnp.bfloat16)
    return accumulator(dtype)
