"""The parts of sequences that lie on the devices of a ring.

A device holds a contiguous part of the positions; or two, in zigzag order. Attention between a part
of the queries and a part of the keys is a call of its own, of which every array is cut, and
which knows where the parts begin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._masks.schedule import SKIPPED, status
from .._tiles.tile import Origin
from .operands import Dimensions, Operands
from .plan import Plan, Ring
from .walk import whole_tile


class Part(NamedTuple):
    """Which queries and keys meet.

    Attributes:
        ring: which devices there are.
        T: queries on each device, and S the keys.
        device: which one this is.
        source: the device that the keys come from.
        a: the part of the queries.
        b: the part of the keys.
    """

    ring: Ring
    T: int
    S: int
    device: Array
    source: Array
    a: Any = np.int32(0)
    b: Any = np.int32(0)

    def cut(self, x: Array, axes: str) -> Array:
        """The part of an array with axes T and S; one of size 1 serves all."""
        starts, sizes = self.place(x.shape, axes)
        return x if tuple(sizes) == x.shape else lax.dynamic_slice(x, starts, sizes)

    def add(self, x: Array, new: Array, axes: str) -> Array:
        """x with new added to this part of it."""
        starts, sizes = self.place(x.shape, axes)
        if tuple(sizes) == x.shape:
            return x + new
        old = lax.dynamic_slice(x, starts, sizes)
        return lax.dynamic_update_slice(x, old + new, starts)

    def put(self, x: Array, new: Array, axes: str) -> Array:
        """x with new in place of this part of it."""
        starts, sizes = self.place(x.shape, axes)
        return new if tuple(sizes) == x.shape else lax.dynamic_update_slice(x, new, starts)

    def place(self, shape: tuple[int, ...], axes: str) -> tuple[list[Any], list[int]]:
        """Where this part of an array begins, and its shape.

        An axis S is of this device's keys, or of those of all devices, one device after the other.
        """
        starts: list[Any] = [np.int32(0)] * len(shape)
        sizes, parts = list(shape), self.ring.parts
        for n, axis in enumerate(axes):
            if axis not in "TS" or shape[n] == 1:
                continue
            length, part = (self.T, self.a) if axis == "T" else (self.S, self.b)
            sizes[n] = length // parts
            starts[n] = part * np.int32(sizes[n])
            if shape[n] != length:
                starts[n] += self.source * np.int32(length)
        return starts, sizes

    def begins(self) -> tuple[Array, Array]:
        """The positions of the first query and the first key."""
        parts = self.ring.parts
        t, s = _block(self.ring, self.device, self.a), _block(self.ring, self.source, self.b)
        return t * np.int32(self.T // parts), s * np.int32(self.S // parts)

    def of(self, operands: Operands, axes: Operands) -> Operands:
        """The operands of this part alone, which know where it begins; axes: ``operand_axes``."""
        t, s = self.begins()
        keys = jnp.full((1,), self.ring.size * self.S, np.int32)
        origin = Origin(element=None, head=None, query=t[None], key=s[None], keys=keys)
        return jax.tree.map(self.cut, operands, axes)._replace(origin=origin)


def _block(ring: Ring, device: Array, part: Array) -> Array:
    """Which of the sequence's blocks a part of a device is: i and 2n - 1 - i in zigzag order."""
    if ring.parts == 1:
        return device
    return jnp.where(part == 0, device, np.int32(2 * ring.size - 1) - device)


def some_pair(operands: Operands, plan: Plan) -> Array:
    """Whether some query of a part may read some key of a part, as far as masks tell ahead."""
    scores, dims = operands.scores, Dimensions.of(operands, plan)
    if scores.mask is None:
        return jnp.array(True)

    def of_instance(instance: Array) -> Array:
        element = instance % np.int32(plan.elements)
        tile = whole_tile(operands, plan)._replace(instance=instance, element=element)
        return status(scores.mask, tile)[0] != SKIPPED

    count = 1 if scores.alike else dims.instances
    return jnp.any(jax.vmap(of_instance)(lax.iota(np.int32, count)))
