"""What a call is compiled as: the one place where layouts, steps and the number format are decided.

The passes look nothing up: what depends on the machine and on the shapes is decided here, and
carried by the ``Plan``. Tiles are chosen before, by the rule or by ``tune`` (``_machine.tuned``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import numpy as jnp

from .._checks.shapes import accumulator
from .._formats.few_rows import FewRows
from .._formats.floats import Floats
from .._formats.int8 import Int8
from .._machine.processor import Machine
from .._machine.tile_rule import FUSED_KEYS, few_rows, score_bytes
from .._passes.plan import Plan
from .._passes.walk import heads_per_step
from .._tiles.layout import Layout
from .._tiles.symbolic import known
from .._tiles.tile import Axis, BlockSizes


def plan_floats(
    query: Any,
    key: Any,
    blocks: BlockSizes,
    layout: Layout,
    here: Machine,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = False,
) -> Plan:
    """The plan for floats.

    Args:
        query: with a batch axis, laid out as ``layout`` says.
        key: alike.
        here: the machine that the call is compiled for.
    """
    B, N, T, _ = layout.sizes(query)
    _, K, S, _ = layout.sizes(key)
    # Keys that are read more than once come into order by head first.
    read_once = known(T) and blocks.q >= T
    kv_layout = layout if read_once else Layout.HEADS_FIRST
    dtype = accumulator(query.dtype)
    if query.dtype == jnp.bfloat16 and here.bfloat16:
        dtype = np.dtype(jnp.bfloat16)
    q, kv, step_scores = Axis.of(T, blocks.q), Axis.of(S, blocks.kv), score_bytes(here) // 4
    number_format = Floats(dtype)
    if kv_layout is Layout.HEADS_LAST and 0 not in (K, T, S):
        rows = N // K * q.block
        if few_rows(rows, heads_per_step(step_scores, K, rows * kv.block)):
            number_format = FewRows(dtype)
    return Plan(
        blocks=blocks,
        layout=layout,
        kv_layout=kv_layout,
        elements=B,
        dtype=np.dtype(query.dtype),
        format=number_format,
        step_scores=step_scores,
        fused=kv.block <= FUSED_KEYS,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
    )


def plan_int8(
    elements: Any,
    S: Any,
    blocks: BlockSizes,
    layout: Layout,
    dtype: np.dtype,
    here: Machine,
    probabilities: np.dtype,
) -> Plan:
    """The plan for integers.

    Args:
        elements: B.
        S: keys.
        dtype: of the output.
        here: the machine that the call is compiled for.
        probabilities: what they are rounded to.
    """
    return Plan(
        blocks=blocks,
        layout=layout,
        kv_layout=Layout.HEADS_FIRST,
        elements=elements,
        dtype=dtype,
        format=Int8(probabilities),
        step_scores=score_bytes(here) // 4,
        fused=Axis.of(S, blocks.kv).block <= FUSED_KEYS,
    )
