"""Sums of gradients, to which every tile adds its part; where none is asked for, nothing is added.

Those of keys and values are summed transposed, (B, K, H, S), in place: see ``backward``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.load import put_tile, take_tile
from .._tiles.tile import QueryTile
from .._tiles.xla import apart
from .operands import Differentiable, Dimensions, Operands
from .plan import Plan
from .scores import Local
from .walk import over


def gradient_shapes(
    operands: Operands, entries: dict[str, int], dtype: np.dtype | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the gradients: as the operands', with first axes of ``entries``."""
    of = {name: getattr(Differentiable.of(operands), name) for name in entries}
    return {
        name: jax.ShapeDtypeStruct((entries[name], *x.shape[1:]), dtype or x.dtype)
        for name, x in of.items()
    }


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sums"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class Gradients:
    """The sums by the names of ``Differentiable``."""

    sums: dict[str, Array]
    plan: Plan

    @classmethod
    def start(cls, operands: Operands, plan: Plan, entries: dict[str, int]) -> Gradients:
        """No sum yet. Entries: the operands to differentiate, and each gradient's first axis."""
        dtype = Dimensions.of(operands, plan).acc
        shapes = gradient_shapes(operands, entries)
        sums = {name: jnp.zeros(_summed(name, x, plan), dtype) for name, x in shapes.items()}
        return cls(sums, plan)

    def finish(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        """The gradients, laid out as the operands and of their dtypes."""
        sums = dict(self.sums)
        for name in ("k", "v"):
            if name in sums:
                turned = jnp.swapaxes(sums[name], 2, 3)
                sums[name] = apart(jnp.moveaxis(turned, 2, self.plan.kv_layout.value))
        return {name: x.astype(shapes[name].dtype) for name, x in sums.items()}

    def add_instances(self, tile: QueryTile, of_each: Gradients) -> Gradients:
        """Adds the gradients of every instance of the tile, each with a first axis in front."""
        sums = dict(self.sums)
        for name, x in of_each.sums.items():
            if sums[name].shape[0] == tile.instances:
                sums[name] = lax.dynamic_update_slice_in_dim(sums[name], x[:, 0], tile.instance, 0)
            else:
                sums[name] += jnp.sum(x, axis=0)
        return Gradients(sums, self.plan)

    def add_keys(self, name: str, tile: QueryTile, j: Array, x: Array) -> Gradients:
        """Adds x (heads, H, width) at key tile j."""
        if tile.wide is not None:
            return self._add_by_head(name, tile, j, x[:, None], lambda n: (n, np.int32(0)))
        return self._add(name, tile, (tile.head, jnp.int32(0), tile.kv.start(j)), x[None])

    def add_queries(self, name: str, tile: QueryTile, x: Array) -> Gradients:
        """Adds x (heads, rows, H) at the queries of the tile."""
        if name not in self.sums:
            return self
        layout, heads, n = self.plan.layout, tile.heads * tile.groups, tile.head * tile.groups
        entry, start = tile.entry_of(self.sums[name]), tile.q.start(tile.i)
        old = take_tile(layout, self.sums[name], entry, n, heads, start, tile.q.block)
        x = (x + old.reshape(x.shape)).reshape(1, heads, tile.q.block, -1)
        new = put_tile(layout, self.sums[name], x, entry, n, start)
        return self._replace(name, new)

    def add_heads(self, name: str, tile: QueryTile, x: Array | None) -> Gradients:
        """Adds x (query heads of the tile,) at those heads; None: nothing."""
        if x is None:
            return self
        return self._add(name, tile, (tile.head * tile.groups,), x.reshape(1, -1))

    def add_instance(self, name: str, tile: QueryTile, x: Array | None) -> Gradients:
        """Adds a scalar at the instance of the tile; None: nothing."""
        return self if x is None else self._add(name, tile, (), x[None])

    def add_local(self, tile: QueryTile, j: Array, local: Local) -> Gradients:
        """Adds the gradients of the parameters that the logits of key tile j depend on."""
        gradients = self.add_instance("soft_cap", tile, local.soft_cap)
        gradients = gradients.add_heads("alibi_slopes", tile, local.alibi_slopes)
        if "bias" not in self.sums or local.bias is None:
            return gradients
        _, N, T, S = self.sums["bias"].shape
        x = local.bias.astype(self.sums["bias"].dtype)
        t = jnp.where(T == 1, 0, tile.q.start(tile.i))
        if tile.wide is not None and S != 1:
            at = lambda n: (jnp.where(N == 1, 0, n * tile.groups), t)  # noqa: E731
            return gradients._add_by_head("bias", tile, j, x, at)
        n = jnp.where(N == 1, 0, tile.head * tile.groups)
        s = jnp.where(S == 1, 0, tile.starts(j)) if tile.wide is None else np.int32(0)
        return gradients._add("bias", tile, (n, t, s), x.reshape(1, -1, *x.shape[2:]))

    def _add_by_head(
        self, name: str, tile: QueryTile, j: Array, x: Array, at: Callable[[Array], tuple]
    ) -> Gradients:
        """Adds x (heads, n, rows, width), whose key tiles each head has of its own.

        Args:
            at: where n and rows begin, of a key/value head.
        """
        if name not in self.sums:
            return self
        starts, (_, n, rows, _), size = tile.starts(j).reshape(-1), x.shape, tile.kv.block
        wide = np.int32(starts.size // tile.heads)

        def add(i: Array, sums: Array) -> Array:
            head, g = i // wide, i % wide
            part = lax.dynamic_slice(x, (head, 0, 0, g * size), (1, n, rows, size))
            place = tile.entry_of(sums), *at(tile.head + head), starts[i]
            old = lax.dynamic_slice(sums, place, part.shape)
            return lax.dynamic_update_slice(sums, old + part, place)

        return self._replace(name, over(jnp.int32(starts.size), add, self.sums[name]))

    def _add(self, name: str, tile: QueryTile, start: tuple[Any, ...], x: Array) -> Gradients:
        """Adds x to the part of a sum that begins at start in the tile's instance."""
        if name not in self.sums:
            return self
        at = (tile.entry_of(self.sums[name]), *start)
        old = lax.dynamic_slice(self.sums[name], at, x.shape)
        return self._replace(name, lax.dynamic_update_slice(self.sums[name], old + x, at))

    def _replace(self, name: str, x: Array) -> Gradients:
        return Gradients(self.sums | {name: x}, self.plan)


def _summed(name: str, x: Any, plan: Plan) -> tuple[int, ...]:
    """Shape that a gradient is summed in: (B, K, H, S) for keys and values."""
    if name not in ("k", "v"):
        return x.shape
    B, K, S, H = plan.kv_layout.sizes(x)
    return B, K, H, S
