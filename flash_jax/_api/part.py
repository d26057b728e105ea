"""The plan of what one device of a mesh has of a call: made anew, for its own sizes."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from .._formats.int8 import Int8, summable
from .._machine.processor import Machine
from .._machine.tile_rule import Problem
from .._passes.plan import Plan
from .._tiles.axis import BlockSizes
from .options import tiles
from .plan import plan_floats, plan_int8


@dataclasses.dataclass(frozen=True)
class PartOf:
    """Makes the plans of parts of a call.

    Attributes:
        machine: the machine that the call is compiled for.
        dtype: of the queries.
        head_dim: size of a head.
        blocks: the caller's tiles; None: each part has its own.
        problem: what the tiles of the call depend on, where they are not the caller's.
    """

    machine: Machine
    dtype: np.dtype
    head_dim: int
    blocks: BlockSizes | None
    problem: Problem | None = None

    def __call__(self, plan: Plan, *, B: int, N: int, K: int, T: int, S: int) -> Plan:
        problem = self.problem
        if problem is not None:
            heads = max(K, 1)
            problem = problem._replace(T=T, S=S, heads=heads, groups=max(1, N // heads))
        blocks, kernel = tiles(self.blocks, problem)
        query, key = (
            jax.ShapeDtypeStruct(
                tuple(plan.layout.axes(B, heads, positions, self.head_dim)), self.dtype
            )
            for heads, positions in ((N, T), (K, S))
        )
        if isinstance(plan.format, Int8):
            return plan_int8(
                query,
                S,
                summable("query", self.head_dim, blocks),
                plan.layout,
                plan.dtype,
                self.machine,
                plan.format.probabilities,
                kernel,
                plan.lse,
                self,
            )
        return plan_floats(
            query,
            key,
            blocks,
            plan.layout,
            self.machine,
            plan.dropout_rate,
            plan.broadcast_dropout,
            kernel,
            plan.lse,
            self,
            plan.kv_layout,
        )
