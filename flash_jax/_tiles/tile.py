"""A tile of queries and the key tiles across from it: positions, and the parts of arrays they meet.

Queries and keys are cut into tiles of block_q and block_kv positions (``axis``). Queries that the
last tile repeats are computed twice; keys that it repeats are masked.

Parts of the scores have four axes, (key/value heads, groups, T, S): query head n reads key/value
head n // groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .axis import Axis, Range
from .symbolic import as_int32
from .xla import divided

A = TypeVar("A")
R = TypeVar("R")

_BEYOND = 2**31 - 1  # every position


class Origin(NamedTuple):
    """Where the part of a call that a device of a mesh has begins. None: at 0."""

    element: Any  # the first batch element of a call
    head: Any  # the first query head
    query: Any
    key: Any
    keys: Any  # how many the call has


class QueryTile(NamedTuple):
    """Query tile i of some heads of one instance, or of several: see ``each``.

    An instance is one batch element of one vmapped call. The first axis of an array has an entry
    per instance, or entries that each serve equally many instances.

    Attributes:
        q: how the queries are cut.
        kv: how the keys are cut.
        instance: the first instance: call * elements + element.
        instances: how many instances there are.
        element: which batch element of its call.
        elements: how many batch elements a call has, B.
        head: the first key/value head.
        heads: how many key/value heads.
        groups: query heads per key/value head.
        i: which tile.
        together: how many consecutive instances share the tile.
        origin: of the part of a call that a device has. All that lies in arrays is counted from
            there; ``element_index``, ``n``, ``t``, ``s``, ``queries``, ``keys`` and ``key_count``
            are of the call.
        wide: how many key tiles a visit takes at once, each key/value head its own; None: one,
            which all heads share. If it is given, a "key tile j" is int32 (heads, wide) of them,
            -1 for none.
        listed: (heads, 1, 1, n) int32, the key tiles that ``keys`` and ``complete`` are of; None:
            all of them.
    """

    q: Axis
    kv: Axis
    instance: Array
    instances: int
    element: Array
    elements: int
    head: Array
    heads: int
    groups: int
    i: Array
    together: int = 1
    origin: Origin | None = None
    wide: int | None = None
    listed: Array | None = None

    @property
    def element_index(self) -> Array:
        """Which batch element of its call."""
        return self._of_call("element", self.element)

    @property
    def n(self) -> Array:
        """(heads, groups, 1, 1): query heads."""
        return self._of_call("head", self.head_indices)

    @property
    def head_indices(self) -> Array:
        """(heads, groups, 1, 1): query heads, as they lie in arrays."""
        n = self.head * self.groups + lax.iota(np.int32, self.heads * self.groups)
        return n.reshape(self.heads, self.groups, 1, 1)

    @property
    def key_heads(self) -> Array:
        """(heads,): key/value heads, as they lie in arrays."""
        return self.head + lax.iota(np.int32, self.heads)

    @property
    def t(self) -> Array:
        """(1, 1, block_q, 1): queries."""
        first = self._of_call("query", self.q.start(self.i))
        return (first + lax.iota(np.int32, self.q.block)).reshape(1, 1, -1, 1)

    def s(self, j: Array) -> Array:
        """(heads or 1, 1, 1, width): keys of key tile j."""
        return self._of_call("key", self._places(j))

    @property
    def queries(self) -> Range:
        """First and last query."""
        start = self._of_call("query", self.q.start(self.i))
        return Range(start, start + self.q.block - 1)

    @property
    def keys(self) -> Range:
        """(heads or 1, 1, 1, key tiles): first and last own key of every key tile."""
        first, last = self.kv.own(self._key_tiles)
        return Range(self._of_call("key", first), self._of_call("key", last))

    @property
    def key_count(self) -> Any:
        """How many keys there are."""
        whole = None if self.origin is None else self.origin.keys
        return as_int32(self.kv.length) if whole is None else whole

    @property
    def own_queries(self) -> Array:
        """(1, 1, block_q, 1): whether no tile before has the query."""
        start = self.q.start(self.i) + lax.iota(np.int32, self.q.block)
        return (start >= self.i * self.q.block).reshape(1, 1, -1, 1)

    def own_keys(self, j: Array) -> Array:
        """(heads or 1, 1, 1, width): whether key tile j is one, and no tile before has the key."""
        if self.wide is None:
            return self._places(j) >= j * self.kv.block
        first = jnp.where(j < 0, np.int32(_BEYOND), j * self.kv.block)
        first = jnp.repeat(first, self.kv.block, axis=1, total_repeat_length=self.width)
        return self._places(j) >= first.reshape(self.heads, 1, 1, -1)

    @property
    def complete(self) -> Array:
        """(heads or 1, 1, 1, key tiles): whether all keys of the tile are its own."""
        j = self._key_tiles
        return self.kv.own(j).first == self.kv.start(j)

    @property
    def _key_tiles(self) -> Array:
        if self.listed is not None:
            return self.listed
        return lax.iota(np.int32, self.kv.count).reshape(1, 1, 1, -1)

    def starts(self, j: Array) -> Array:
        """Where key tile j begins in arrays, of the shape of j; 0 for none."""
        return self.kv.start(j if self.wide is None else jnp.maximum(j, 0))

    def _places(self, j: Array) -> Array:
        """(heads or 1, 1, 1, width): where the keys of key tile j lie in arrays."""
        within = jnp.expand_dims(lax.iota(np.int32, self.kv.block), range(jnp.ndim(j)))
        places = self.starts(j)[..., None] + within
        return places.reshape(1 if self.wide is None else self.heads, 1, 1, -1)

    def _of_call(self, axis: str, index: Array) -> Array:
        """An index into the part of a call that is here, as one into the call."""
        first = None if self.origin is None else getattr(self.origin, axis)
        return index if first is None else index + first

    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the scores of one key tile."""
        return self.heads, self.groups, self.q.block, self.width

    @property
    def width(self) -> int:
        """Columns of scores of one key tile."""
        return self.kv.block * (1 if self.wide is None else self.wide)

    @property
    def rows(self) -> int:
        """Rows of scores of one key/value head."""
        return self.groups * self.q.block

    def as_rows(self, x: Array, width: int | None = None) -> Array:
        """x, which broadcasts to ``shape()``, as (heads, rows, width); width: default that."""
        x = jnp.broadcast_to(x, (*self.shape()[:3], self.width if width is None else width))
        return x.reshape(self.heads, self.rows, -1)

    def plus(self, s: Array, x: Array) -> Array:
        """s (heads, rows, block_kv) + x, which broadcasts to ``shape()``, and is not spread."""
        return (s.reshape(self.shape()) + x).reshape(s.shape)

    def each(self, function: Callable[[QueryTile, A], R], arrays: A) -> R:
        """function(tile, arrays) of every instance, its results along a first axis.

        The function sees a tile of one instance, and arrays with the entry of that instance only.
        ``vmap`` maps it, under which a loop would run until the last instance is done: it must have
        none.
        """
        if self.together == 1:
            return jax.tree.map(lambda x: x[None], function(self, arrays))
        count = lax.iota(np.int32, self.together)

        def part(x: Array) -> Array:
            """The entries of x that serve these instances, or the only one."""
            served = self.instances // x.shape[0]
            if served == 1:
                return lax.dynamic_slice_in_dim(x, self.instance, self.together)
            return x if x.shape[0] == 1 else x[divided(self.instance + count, as_int32(served))[0]]

        def of_one(element: Array, leaves: list[Array]) -> R:
            entries = [x if axis is None else x[None] for x, axis in zip(leaves, axes, strict=True)]
            one = dict(instance=np.int32(0), instances=1, element=element, elements=1, together=1)
            return function(self._replace(**one), jax.tree.unflatten(tree, entries))

        leaves, tree = jax.tree.flatten(arrays)
        axes = [None if x.shape[0] == 1 else 0 for x in leaves]
        elements = divided(self.element + count, as_int32(self.elements))[1]
        return jax.vmap(of_one, in_axes=(0, axes))(elements, [part(x) for x in leaves])

    def entry_of(self, x: Array) -> Array:
        """Index into the first axis of x: the entry that serves the instance."""
        return divided(self.instance, as_int32(self.instances // x.shape[0]))[0]

    def of_instance(self, x: Any) -> Array:
        """The entry of x that serves the instance, without the first axis."""
        return lax.dynamic_index_in_dim(x, self.entry_of(x), 0, keepdims=False)

    def of_heads(self, x: Any) -> Array:
        """(heads, groups, 1, 1) of x (B or 1, N)."""
        x = self.of_instance(x)
        size = self.heads * self.groups
        x = lax.dynamic_slice_in_dim(x, self.head * self.groups, size)
        return x.reshape(self.heads, self.groups, 1, 1)

    def of_queries(self, x: Any) -> Array:
        """(1, 1, block_q, 1) of x (B or 1, T)."""
        x = lax.dynamic_slice_in_dim(self.of_instance(x), self.q.start(self.i), self.q.block)
        return x.reshape(1, 1, -1, 1)

    def of_keys(self, x: Any, j: Array) -> Array:
        """(heads or 1, 1, 1, width) of x (B or 1, S), for key tile j."""
        if self.wide is not None:
            return jnp.take(self.of_instance(x), self._places(j), mode="clip")
        x = lax.dynamic_slice_in_dim(self.of_instance(x), self.kv.start(j), self.kv.block)
        return x.reshape(1, 1, 1, -1)

    def of_keys_by_head(self, x: Array, j: Array) -> Array:
        """(heads, width) of x (heads, S), for the key tiles j of each head."""
        return jnp.take_along_axis(x, self._places(j)[:, 0, 0], axis=1, mode="clip")

    def of_scores(self, x: Any, j: Array | None = None) -> Array:
        """The part of x (B or 1, N or 1, T or 1, S or 1) for key tile j, or for all keys.

        (heads, groups, block_q, width or S), with 1 where x has 1.
        """
        if self.wide is not None and j is not None and x.shape[3] != 1:
            return jnp.take_along_axis(self.of_scores(x), self._places(j), axis=3, mode="clip")
        x = self.of_instance(x)
        parts = [
            (self.head * self.groups, self.heads * self.groups),
            (self.q.start(self.i), self.q.block),
            (self.kv.start(j), self.kv.block) if j is not None else (np.int32(0), self.kv.length),
        ]
        for axis, (start, size) in enumerate(parts):
            if x.shape[axis] != 1:
                x = lax.dynamic_slice_in_dim(x, start, size, axis)
        heads = (1, 1) if x.shape[0] == 1 else (self.heads, self.groups)
        return x.reshape(*heads, *x.shape[1:])

    def in_key_tiles(self, x: Array) -> Array:
        """x (..., S) as (..., key tiles, block_kv), a ragged end filled up with the last key."""
        missing = self.kv.count * self.kv.block - self.kv.length
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], mode="edge")
        return x.reshape(*x.shape[:-1], self.kv.count, self.kv.block)

    def of_listed(self, x: Array) -> Array:
        """The part of x (heads or 1, groups or 1, 1, key tiles) for the tiles that are listed."""
        if self.listed is None:
            return x
        return jnp.take_along_axis(x, self.listed, axis=3, mode="clip")
