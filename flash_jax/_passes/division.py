"""Which axes of a mesh divide which axes of a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from .axes import Axes


class Division(NamedTuple):
    """Axes of a mesh by the axes of a call.

    Query heads may be divided further than key and value heads: by ``shared``, the last of their
    axes of the mesh. The devices along these have the same key and value heads, of which each
    reads only those of its own query heads.
    """

    sizes: dict[str, int]  # of the call
    mesh: dict[str, int]  # sizes of its axes
    by: dict[str, tuple[str, ...]]
    shared: tuple[str, ...] = ()

    def count(self, c: str) -> int:
        """How many parts an axis is divided into."""
        return math.prod(self.mesh[name] for name in self.by.get(c, ()))

    def size(self, c: str) -> int:
        """How much of an axis a device has."""
        return self.sizes[c] // self.count(c)

    def first(self, c: str) -> Array | None:
        """Where that begins, int32; None: the axis is not divided."""
        by = self.by.get(c, ())
        return np.int32(self.size(c)) * lax.axis_index(by).astype(np.int32) if by else None

    def spec(self, names: str) -> PartitionSpec:
        """The sharding of an array."""
        return PartitionSpec(*(self.by.get(c) or None for c in names))

    def summed(self, names: str) -> tuple[str, ...]:
        """The axes of a mesh over which a sum over all pairs is yet to be summed.

        Args:
            names: the axes of the call that the sum has.
        """
        by = (name for c, of_c in self.by.items() if c not in (*names, "K") for name in of_c)
        own = self.by["K"] if "K" in names else ()
        return tuple(name for name in by if name not in own)

    @property
    def read_heads(self) -> tuple[Array, int] | None:
        """Which of its key and value heads a device reads, first and count; None: all."""
        if not self.shared or self.size("K") == 1:
            return None
        groups, own = self.sizes["N"] // self.sizes["K"], self.size("N")
        first = lax.axis_index(self.shared).astype(np.int32) * np.int32(own) // np.int32(groups)
        return first, max(1, own // groups)


def divide(mesh: Any, axes: Axes, leaves: Sequence[Any], results: Sequence[Any]) -> Division:
    """The division that shardings ask for; those of queries come first.

    Args:
        leaves: with shapes and shardings, as ``axes.leaves`` names them.
        results: alike.
    """
    sizes, by, of_mesh = axes.sizes, {}, dict(mesh.shape)
    names = [axes.leaves[0], *axes.results, *axes.leaves]
    arrays = list(zip(names, [leaves[0], *results, *leaves], strict=False))

    def count(found: Sequence[str]) -> int:
        return math.prod(of_mesh[name] for name in found)

    def found(*of: str) -> tuple[str, ...]:
        """The axes of the mesh that divide one of these in the first array that is so divided."""
        taken = {name for found in by.values() for name in found}
        for c in of:
            for names, x in arrays:
                entry = x.sharding.spec[names.index(c)] if c in names else None
                entry = (entry,) if isinstance(entry, str) else entry or ()
                free = tuple(name for name in entry if name not in taken)
                if free and sizes[c] % count(free) == 0:
                    return free
        return ()

    for c in (*(c for c in sizes if c not in "NKTS"), "T"):
        by[c] = found(c)
    heads, shared = found("N", "K"), ()
    while sizes["N"] % count(heads) or sizes["K"] % count(heads):
        heads, shared = heads[:-1], (heads[-1], *shared)
    own = sizes["N"] // count((*heads, *shared))
    groups = sizes["N"] // max(1, sizes["K"])
    if sizes["N"] % count((*heads, *shared)) or (own % groups and groups % own):
        shared = ()  # a part would cut through a group
    by |= {"N": (*heads, *shared), "K": heads}
    by["S"] = found("S")
    return Division(sizes, of_mesh, by, shared)
