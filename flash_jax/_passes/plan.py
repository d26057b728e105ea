"""All that is compiled in: decided once per call, before any value is known (``_api.plan``).

A plan is hashable: it is part of what JAX's caches compare.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from .._checks.shapes import accumulator
from .._tiles.axis import BlockSizes
from .._tiles.layout import Layout
from .products import FewFormat, Format

# Of a step of kernels. No score is stored, but would be should XLA not fuse: 256 MiB at the most.
KERNEL_SCORES = 2**26
# Per core, since every operation of a step wakes all cores and waits for them: how many numbers of
# queries, keys and values a step of kernels copies, and how many bytes of scores a step of the
# backward pass stores. For more cores than these temporaries would grow beyond 64 MiB.
KERNEL_NUMBERS = 2**20
BACKWARD_BYTES = 2**22
_MOST_CORES = 16
_STORED = 8  # fewer scores in a step of kernels that stores what is as large as these


class Part(Protocol):
    """Makes plans of parts of a call. It is hashable: it is part of the plan."""

    def __call__(self, plan: Plan, *, B: int, N: int, K: int, T: int, S: int) -> Plan:
        """The plan of a part of these sizes; keys and values lie as in ``plan``."""
        ...


@dataclasses.dataclass(frozen=True)
class Ring:
    """How keys travel round a mesh axis: see ``ring``.

    Attributes:
        axis: of the mesh; one name, or several.
        size: how many devices.
        parts: contiguous parts of a device's sequences: 1, or 2 in zigzag order.
        rounds: those that some device needs. In round r device i has the keys of device i - r.
    """

    axis: str | tuple[str, ...]
    size: int
    parts: int
    rounds: tuple[int, ...]


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
        cores: of the device.
        step_numbers: how many numbers of queries, keys, values and output a step of several
            instances should hold; None: as few as the scores allow.
        kernel: positions per tile of the fast way, one kernel per tile; None: there is none, and
            the exact loop serves alone.
        multiplied: what kernels of the backward pass multiply; None: there are none.
        few: how few query rows are multiplied with all keys at once; None: tile by tile.
        few_keys: keys per tile of that, where no more than a part of them is read.
        lse: whether the caller asks for lse, and not for the output alone.
        fused: whether XLA makes one kernel of product, maximum and difference of whole rows, which
            then is the fastest way.
        dropout_rate: in [0, 1).
        broadcast_dropout: all heads drop the same.
        part: makes the plan of what one device of a mesh has of a call; None: it has this one.
        ring: where the sequences lie on several devices, how keys reach every query.
    """

    blocks: BlockSizes
    layout: Layout
    kv_layout: Layout
    elements: Any
    dtype: np.dtype
    format: Format
    step_scores: int
    cores: int = 1
    step_numbers: int | None = None
    kernel: BlockSizes | None = None
    multiplied: np.dtype | None = None
    few: FewFormat | None = None
    few_keys: int = 0
    lse: bool = True
    fused: bool = False
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False
    part: Part | None = None
    ring: Ring | None = None

    def of_part(self, **sizes: int) -> Plan:
        """The plan of a part of the call, of sizes B, N, K, T and S."""
        if self.part is None:
            return dataclasses.replace(self, elements=sizes["B"])
        return self.part(self, **sizes)

    @property
    def of_kernels(self) -> Plan:
        """The plan of the walk that makes one kernel of a tile."""
        assert self.kernel is not None
        scores, numbers = KERNEL_SCORES, min(self.cores, _MOST_CORES) * KERNEL_NUMBERS
        return dataclasses.replace(
            self, blocks=self.kernel, step_scores=scores, step_numbers=numbers
        )

    @property
    def of_stored_kernels(self) -> Plan:
        """As ``of_kernels``, where a step also stores some array as large as its scores."""
        plan = self.of_kernels
        assert plan.step_numbers is not None
        scores, numbers = KERNEL_SCORES // _STORED, plan.step_numbers // _STORED
        return dataclasses.replace(plan, step_scores=scores, step_numbers=numbers)

    @property
    def of_backward(self) -> Plan:
        """The plan of the backward pass where it makes kernels of full tiles."""
        assert self.multiplied is not None
        blocks = BlockSizes(min(self.blocks.q, 512), min(self.blocks.kv, 512))
        stored = min(self.cores, _MOST_CORES) * BACKWARD_BYTES
        scores = stored // (2 * self.multiplied.itemsize)
        return dataclasses.replace(self, blocks=blocks, step_scores=scores)

    @property
    def without_ring(self) -> Plan:
        """The plan of one part of the queries against one part of the keys of a ring."""
        return dataclasses.replace(self, dtype=accumulator(self.dtype), lse=True, ring=None)
