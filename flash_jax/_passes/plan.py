"""All that is compiled in: decided once per call, before any value is known (``_api.plan``).

A plan is hashable: it is part of what JAX's caches compare.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .._tiles.layout import Layout
from .._tiles.tile import BlockSizes
from .products import Format


@dataclasses.dataclass(frozen=True)
class Plan:
    """How attention is computed.

    Attributes:
        blocks: positions per tile.
        layout: where the positions of queries and of the output lie.
        kv_layout: where those of keys and values lie. Keys that are read once per tile of queries
            come heads first where there are many tiles.
        elements: batch elements of one call; more instances than that are vmapped calls.
        dtype: of the output.
        format: how a tile is multiplied.
        step_scores: how many float32 scores a step should hold.
        fused: whether XLA makes one kernel of product, maximum and difference of whole rows, which
            then is the fastest way.
        dropout_rate: in [0, 1).
        broadcast_dropout: all heads drop the same.
    """

    blocks: BlockSizes
    layout: Layout
    kv_layout: Layout
    elements: Any
    dtype: np.dtype
    format: Format
    step_scores: int
    fused: bool = False
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False
