"""Masks as O(T + S) descriptions of which query may read which key.

A mask answers two questions about a tile of queries, and builds no (T, S) array for either:
    keep    inside one tile: may query t read key s?
    tiles   of every key tile: does some pair, does every pair remain? Tiles without any are
            skipped, tiles with every pair need no mask work
A third one, ``read_keys``, is about all queries at once: which keys does any of them read?
Masks are pytrees: their arrays may be traced, batched by ``vmap`` and passed to jitted functions.
Combine them with ``&`` and ``|``.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import numpy as np
from jax import Array, export, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.shapes import (
    Sizes,
    as_option,
    bind_integers,
    bind_scores,
    check_integers,
    natural_number,
    positive_integer,
    window_side,
)
from .._tiles.symbolic import as_int32, largest, pad_axes
from .._tiles.tile import Axis, QueryTile, Range

M = TypeVar("M", bound=type)

_OPERATORS: dict[Any, str] = {operator.and_: "and", operator.or_: "or"}
_NAMED: dict[Any, Any] = {name: operator_ for operator_, name in _OPERATORS.items()}


class Mask:
    """Which pairs of query and key are kept; the base of all masks.

    ``a & b`` keeps the pairs that both keep, ``a | b`` those that either keeps.

    Masks are used bound: ``bind`` checks the arrays against the sizes of a call and gives each a
    first axis of size B or 1, ``keep`` and ``tiles`` then read them through a ``QueryTile``.

    Example:
        >>> prefix_lm = PrefixMask(2) | CausalMask()
        >>> print((prefix_lm & LengthMask(kv=3)).to_array(4, 4).astype(int))
        [[1 1 0 0]
         [1 1 0 0]
         [1 1 1 0]
         [1 1 1 0]]
    """

    arrays: ClassVar[dict[str, str]] = {}  # the fields that hold arrays, and their axes but B
    masks: ClassVar[tuple[str, ...]] = ()  # the fields that hold masks

    optional: ClassVar[bool] = False  # whether the arrays may be None

    def __post_init__(self) -> None:
        for name in self.arrays:
            x = getattr(self, name)
            if isinstance(x, list):  # a tree would take it apart
                x = as_option(f"{type(self).__name__}.{name}", x)
                object.__setattr__(self, name, x)
            check_integers(f"{type(self).__name__}.{name}", x)

    def bind(self, sizes: Sizes) -> Mask:
        """The mask with its arrays checked, named in errors as the class's fields are."""
        bound = {
            name: bind_integers(f"{type(self).__name__}.{name}", getattr(self, name), axes, sizes)
            for name, axes in self.arrays.items()
            if not (self.optional and getattr(self, name) is None)
        }
        return dataclasses.replace(self, **bound)  # pyright: ignore[reportArgumentType]

    def padded(self, missing: dict[str, Any]) -> Mask:
        """The bound mask with so many zeros behind the axes T and S of its arrays."""
        arrays = {name: getattr(self, name) for name in self.arrays}
        padded = {
            name: pad_axes(x, ("B" + self.arrays[name])[-x.ndim :], missing)
            for name, x in arrays.items()
            if x is not None
        }
        padded |= {name: getattr(self, name).padded(missing) for name in self.masks}
        return dataclasses.replace(self, **padded)  # pyright: ignore[reportArgumentType]

    def keep(self, tile: QueryTile, j: Array) -> Array:
        """Whether the pairs of key tile j are kept: bool, broadcastable to ``tile.shape()``."""
        raise NotImplementedError

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        """(some, every) of each key tile: bool, broadcastable to (heads, groups, 1, key tiles).

        ``some`` is False only where no pair is kept, ``every`` is True only where all are.
        """
        raise NotImplementedError

    def read_keys(self, T: int, S: int) -> Array:
        """Which keys some query may read: bool (B or 1, S), False only where none does."""
        return jnp.full((1, S), True)

    def __and__(self, other: Mask) -> Mask:
        """Keeps the pairs that both keep."""
        return (
            CombinedMask(operator.and_, self, other) if isinstance(other, Mask) else NotImplemented
        )

    def __or__(self, other: Mask) -> Mask:
        """Keeps the pairs that either keeps."""
        return (
            CombinedMask(operator.or_, self, other) if isinstance(other, Mask) else NotImplemented
        )

    def __bool__(self) -> bool:
        """Refused: ``a and b`` would be b alone, without a word."""
        raise TypeError(
            f"{type(self).__name__} must not be used as a bool: combine masks by & and |, not by "
            "`and`, `or` and `not`, and compare one with None by `is`"
        )

    @property
    def ndim(self) -> int:
        """Not there, as ``hasattr`` says: the first thing that Flax asks a mask for in decoding."""
        raise AttributeError(
            f"{type(self).__name__} must not be used as an array, and has no ndim: it describes "
            "which query reads which key. Flax's decode=True combines the mask of its cache, which "
            "is causal already, with arrays only: leave mask out, or pass a bool array"
        )

    def to_array(self, T: int, S: int, *, batch: int = 0, head: int = 0) -> Array:
        """The mask of one batch element and one query head as bool (T, S), to look at.

        Raises:
            ValueError: a size is not positive, the mask's arrays do not fit it, or it has no such
                batch element.
            TypeError: a size or an index is no integer.

        Example:
            >>> CausalMask().to_array(2, 2).tolist()
            [[True, False], [True, True]]
        """
        T, S = positive_integer("T", T), positive_integer("S", S)
        bound, tile = first_tile(self, T, S, (T, S), batch, head)
        assert bound is not None
        return jnp.broadcast_to(bound.keep(tile, jnp.int32(0)), tile.shape())[0, 0]


def first_tile(
    mask: Mask | None, T: int, S: int, blocks: tuple[int, int], batch: int, head: int
) -> tuple[Mask | None, QueryTile]:
    """The bound mask and the first tile of queries of one batch element and one query head."""
    batch, head = natural_number("batch", batch), natural_number("head", head)
    bound = None if mask is None else mask.bind(Sizes(T=T, S=S))
    B = max((x.shape[0] for x in jax.tree.leaves(bound)), default=1)
    if B > 1 and batch >= B:
        raise ValueError(f"batch must be below the mask's batch size, {B}; it is {batch}")
    B = max(B, batch + 1)
    row = jnp.int32(batch)
    at = (row, (B, B), row, jnp.int32(head), 1, 1, jnp.int32(0))
    return bound, QueryTile(Axis.of(T, blocks[0]), Axis.of(S, blocks[1]), *at)


@dataclass_transform(frozen_default=True)
def _mask(cls: M) -> M:
    """A frozen dataclass that is a pytree: its arrays are traced, its other fields static."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    data = [name for name in names if name in cls.arrays or name in cls.masks]
    jax.tree_util.register_dataclass(cls, data, [name for name in names if name not in data])
    # For exported functions that take one; a PredicateMask's function is refused then.
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"flash_jax.{cls.__name__}",
        serialize_auxdata=lambda static: json.dumps(
            [_OPERATORS.get(x, x) for x in static]
        ).encode(),
        deserialize_auxdata=lambda text: tuple(_NAMED.get(x, x) for x in json.loads(text)),
    )
    return cls


@_mask
class CombinedMask(Mask):
    """``a & b`` or ``a | b``; its tiles are judged from the judgements of a and of b."""

    masks: ClassVar = ("a", "b")
    op: Callable[[Any, Any], Any]
    a: Mask
    b: Mask

    def bind(self, sizes: Sizes) -> Mask:
        return CombinedMask(self.op, self.a.bind(sizes), self.b.bind(sizes))

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return self.op(self.a.keep(tile, j), self.b.keep(tile, j))

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        (some, every), (some_b, every_b) = self.a.tiles(tile), self.b.tiles(tile)
        return self.op(some, some_b), self.op(every, every_b)

    def read_keys(self, T: int, S: int) -> Array:
        return self.op(self.a.read_keys(T, S), self.b.read_keys(T, S))


@_mask
class CausalMask(Mask):
    """Query t reads keys 0..t + offset.

    Args:
        offset: int32, a scalar or (B,).

    Example:
        >>> print(CausalMask(offset=1).to_array(2, 4).astype(int))
        [[1 1 0 0]
         [1 1 1 0]]
    """

    arrays: ClassVar = {"offset": ""}
    offset: ArrayLike = 0

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return tile.s(j) <= tile.t + tile.of_element(self.offset)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        offset = tile.of_element(self.offset)
        t, s = tile.queries, tile.keys
        return s.first <= t.last + offset, s.last <= t.first + offset

    def read_keys(self, T: int, S: int) -> Array:
        return _keys(S) <= _column(self.offset) + as_int32(T - 1)


@_mask
class WindowMask(Mask):
    """Query t reads keys t + offset - left .. t + offset + right; None leaves a side open.

    Args:
        left: how many keys before position t + offset, >= 0 or None.
        right: how many keys after it, >= 0 or None.
        offset: int32, a scalar or (B,).

    Raises:
        ValueError: a side is negative.
        TypeError: a side is neither an integer nor None.

    Example:
        >>> print(WindowMask(1, 0).to_array(3, 4).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [0 1 1 0]]
    """

    arrays: ClassVar = {"offset": ""}
    left: int | None
    right: int | None
    offset: ArrayLike = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("left", "right"):
            object.__setattr__(self, name, window_side(name, getattr(self, name)))

    def keep(self, tile: QueryTile, j: Array) -> Array:
        s, t = tile.s(j), tile.t + tile.of_element(self.offset)
        return _inside(self, Range(s, s), Range(t, t))

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        offset, s = tile.of_element(self.offset), tile.keys
        first, last = tile.queries.first + offset, tile.queries.last + offset
        some = _inside(self, Range(s.last, s.first), Range(first, last))
        return some, _inside(self, s, Range(last, first))

    def read_keys(self, T: int, S: int) -> Array:
        s, first = _keys(S), _column(self.offset)
        return _inside(self, Range(s, s), Range(first, first + as_int32(T - 1)))


def _inside(mask: WindowMask, s: Range, t: Range) -> Array:
    """Whether s.first is not left of the window of t.first, nor s.last right of that of t.last."""
    inside = jnp.full(jnp.broadcast_shapes(s.first.shape, t.first.shape), True)
    if mask.left is not None:
        inside = inside & (s.first + mask.left >= t.first)
    if mask.right is not None:
        inside = inside & (s.last - mask.right <= t.last)
    return inside


@_mask
class SegmentMask(Mask):
    """A query reads the keys of its own segment: packed documents.

    Tiles are judged by the smallest and largest id in them: ids that are sorted, or at least come
    in runs, skip best.

    Args:
        q_ids: integers (T,) or (B, T).
        kv_ids: integers (S,) or (B, S).

    Example:
        >>> ids = jnp.array([7, 7, 9])
        >>> print(SegmentMask(ids, ids).to_array(3, 3).astype(int))
        [[1 1 0]
         [1 1 0]
         [0 0 1]]
    """

    arrays: ClassVar = {"q_ids": "T", "kv_ids": "S"}
    q_ids: ArrayLike
    kv_ids: ArrayLike

    def bind(self, sizes: Sizes) -> Mask:
        q_ids = bind_integers("SegmentMask.q_ids", self.q_ids, "T", sizes)
        kv_ids = bind_integers("SegmentMask.kv_ids", self.kv_ids, "S", sizes)
        return segments(q_ids, kv_ids)

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return tile.of_queries(self.q_ids) == tile.of_keys(self.kv_ids, j)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        q = tile.of_queries(self.q_ids)
        kv = tile.in_key_tiles(tile.of_element(self.kv_ids).reshape(1, 1, 1, -1))
        q_low, q_high, low, high = jnp.min(q), jnp.max(q), jnp.min(kv, -1), jnp.max(kv, -1)
        some = (low <= q_high) & (q_low <= high)
        return some, some & (low == high) & (q_low == q_high)

    def read_keys(self, T: int, S: int) -> Array:
        q_ids, kv_ids = jnp.sort(jnp.asarray(self.q_ids), axis=1), jnp.asarray(self.kv_ids)
        rows = largest((q_ids.shape[0], kv_ids.shape[0]))
        q_ids, kv_ids = (jnp.broadcast_to(x, (rows, x.shape[1])) for x in (q_ids, kv_ids))
        first = jax.vmap(jnp.searchsorted)(q_ids, kv_ids)  # of the ids that are not less
        last = as_int32(T - 1 if T != 0 else 0)
        nearest = jnp.take_along_axis(q_ids, jnp.minimum(first, last), axis=1, mode="clip")
        return nearest == kv_ids


def segments(q_ids: Array, kv_ids: Array) -> SegmentMask:
    """The bound mask of bound ids, which may be of two integer dtypes."""
    dtype = jnp.promote_types(q_ids.dtype, kv_ids.dtype)
    return SegmentMask(q_ids.astype(dtype), kv_ids.astype(dtype))


@_mask
class LengthMask(Mask):
    """Only the first q queries and kv keys exist, the rest is padding; None: all do.

    Args:
        q: int32, a scalar or (B,), or None.
        kv: int32, a scalar or (B,), or None.

    Example:
        >>> print(LengthMask(q=1, kv=2).to_array(2, 4).astype(int))
        [[1 1 0 0]
         [0 0 0 0]]
    """

    arrays: ClassVar = {"q": "", "kv": ""}
    optional: ClassVar = True
    q: ArrayLike | None = None
    kv: ArrayLike | None = None

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return _both_exist(self, tile, tile.t, tile.s(j))

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        t, s = tile.queries, tile.keys
        some = _both_exist(self, tile, t.first, s.first)
        return some, _both_exist(self, tile, t.last, s.last)

    def read_keys(self, T: int, S: int) -> Array:
        return jnp.full((1, S), True) if self.kv is None else _keys(S) < _column(self.kv)


def _both_exist(mask: LengthMask, tile: QueryTile, t: Array, s: Array) -> Array:
    exist = jnp.full_like(s, True, dtype=bool)
    if mask.q is not None:
        exist = exist & (t < tile.of_element(mask.q))
    if mask.kv is not None:
        exist = exist & (s < tile.of_element(mask.kv))
    return exist


@_mask
class PrefixMask(Mask):
    """Every query reads keys 0..n-1. ``PrefixMask(n) | CausalMask()`` is a prefix language model.

    Args:
        n: int32, a scalar or (B,).

    Example:
        >>> print(PrefixMask(1).to_array(2, 4).astype(int))
        [[1 0 0 0]
         [1 0 0 0]]
    """

    arrays: ClassVar = {"n": ""}
    n: ArrayLike

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return tile.s(j) < tile.of_element(self.n)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        n = tile.of_element(self.n)
        return tile.keys.first < n, tile.keys.last < n

    def read_keys(self, T: int, S: int) -> Array:
        return _keys(S) < _column(self.n)


@_mask
class PredicateMask(Mask):
    """Keeps where ``fn(b, h, q_index, k_index)`` is True. No tile is known to be empty or full.

    Args:
        fn: called under tracing with int32 indices that broadcast together (batch element, query
            head, query, key); returns bool. It should be one function, not a new lambda per call:
            calls are cached by it. It must not close over traced arrays.

    Example:
        >>> def every_other(b, h, q_index, k_index):
        ...     return (q_index - k_index) % 2 == 0
        >>> print(PredicateMask(every_other).to_array(2, 4).astype(int))
        [[1 0 1 0]
         [0 1 0 1]]
    """

    fn: Callable[[Array, Array, Array, Array], Array]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn of PredicateMask must be a function; it is {self.fn!r}")

    def keep(self, tile: QueryTile, j: Array) -> Array:
        kept = self.fn(tile.element, tile.n, tile.t, tile.s(j))
        kind = "bool" if isinstance(kept, bool) else getattr(kept, "dtype", type(kept).__name__)
        if kind != np.bool_:
            raise TypeError(f"fn of PredicateMask must return bool; it returned {kind}")
        kept, full = jnp.asarray(kept), tile.shape()
        sizes = zip(kept.shape[::-1], full[::-1], strict=False)
        if kept.ndim > 4 or any(n not in (1, m) for n, m in sizes):
            raise ValueError(
                "fn of PredicateMask must return what broadcasts with its indices to "
                f"{full}; it returned shape {kept.shape}"
            )
        return kept

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        unknown = jnp.full_like(tile.keys.first, True, dtype=bool)
        return unknown, ~unknown


@_mask
class ArrayMask(Mask):
    """The caller's own array: bool, broadcastable to (B, N, T, S), read tile by tile."""

    arrays: ClassVar = {"kept": "NTS"}
    kept: Array  # (B or 1, N or 1, T or 1, S or 1)

    def bind(self, sizes: Sizes) -> Mask:
        return ArrayMask(bind_scores("mask", self.kept, "bool", np.bool_, sizes))

    def keep(self, tile: QueryTile, j: Array) -> Array:
        return tile.of_scores(self.kept, j)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        rows = tile.of_scores(self.kept)
        some, every = jnp.any(rows, axis=2, keepdims=True), jnp.all(rows, axis=2, keepdims=True)
        if rows.shape[3] == 1:
            return some, every
        return jnp.any(tile.in_key_tiles(some), -1), jnp.all(tile.in_key_tiles(every), -1)

    def read_keys(self, T: int, S: int) -> Array:
        read = jnp.any(self.kept, axis=(1, 2))
        return jnp.broadcast_to(read, (read.shape[0], S))


def _keys(S: int) -> Array:
    """(1, S): keys."""
    return lax.iota(np.int32, S)[None]


def _column(x: Any) -> Array:
    """(B or 1, 1) of a bound array (B or 1,)."""
    return jnp.asarray(x)[:, None]
