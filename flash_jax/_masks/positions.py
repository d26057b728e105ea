"""Masks by position: of the query, of the key, or of both.

Each is judged by the first and last positions of a tile, so every empty and every full tile is
known, but for ``PredicateMask``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.numbers import window_side
from .._tiles.axis import Range
from .._tiles.symbolic import as_int32
from .._tiles.tile import QueryTile
from .base import Mask, mask_type


@mask_type
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
        return tile.s(j) <= tile.t + tile.of_instance(self.offset)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        offset = tile.of_instance(self.offset)
        t, s = tile.queries, tile.keys
        return s.first <= t.last + offset, s.last <= t.first + offset

    def read_keys(self, T: int, S: int) -> Array:
        return _keys(S) <= _column(self.offset) + as_int32(T - 1)


@mask_type
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
        s, t = tile.s(j), tile.t + tile.of_instance(self.offset)
        return _inside(self, Range(s, s), Range(t, t))

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        offset, s = tile.of_instance(self.offset), tile.keys
        first, last = tile.queries.first + offset, tile.queries.last + offset
        some = _inside(self, Range(s.last, s.first), Range(first, last))
        return some, _inside(self, s, Range(last, first))

    def read_keys(self, T: int, S: int) -> Array:
        s, first = _keys(S), _column(self.offset)
        return _inside(self, Range(s, s), Range(first, first + as_int32(T - 1)))


def _inside(mask: WindowMask, s: Range, t: Range) -> Array:
    """Whether s.first is not left of t.first's window, and s.last not right of t.last's."""
    inside = jnp.full(jnp.broadcast_shapes(s.first.shape, t.first.shape), True)
    if mask.left is not None:
        inside = inside & (s.first + mask.left >= t.first)
    if mask.right is not None:
        inside = inside & (s.last - mask.right <= t.last)
    return inside


@mask_type
class LengthMask(Mask):
    """Only the first q queries and kv keys exist, the rest is padding. None: all exist.

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
    """Whether query t and key s exist."""
    exist = jnp.full_like(s, True, dtype=bool)
    if mask.q is not None:
        exist = exist & (t < tile.of_instance(mask.q))
    if mask.kv is not None:
        exist = exist & (s < tile.of_instance(mask.kv))
    return exist


@mask_type
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
        return tile.s(j) < tile.of_instance(self.n)

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        n = tile.of_instance(self.n)
        return tile.keys.first < n, tile.keys.last < n

    def read_keys(self, T: int, S: int) -> Array:
        return _keys(S) < _column(self.n)


@mask_type
class PredicateMask(Mask):
    """Keeps the pairs where ``fn(b, h, q_index, k_index)`` is True.

    Every tile counts as partial, and is visited, unless ``bounds`` or ``monotone`` tells more.

    Args:
        fn: called under tracing with int32 indices that broadcast together (batch element, query
            head, query, key); returns bool. It should be one function, not a new lambda per call:
            calls are cached by it. It must not close over traced arrays.
        bounds: ``bounds(b, h, q, k)``, called as fn, but with the ranges of positions of a tile in
            place of indices: ``q.first`` and ``q.last``, ``k.first`` and ``k.last``, both ends
            included. Returns a pair of bools (some, every). **some** may be False only where no
            pair of the tile is kept: the tile is skipped. **every** may be True only where all are:
            fn is not asked. Where it is unsure, it returns (True, False). What it says is not
            checked: a wrong answer gives wrong results.
        monotone: promises that along the queries, with all else fixed, fn turns at most once, from
            False to True everywhere or from True to False everywhere; and alike along the keys.
            Then the four corners of a tile tell whether some and whether all of its pairs are kept.
            It holds for q_index >= k_index, and for a prefix; not for a window, which is two such
            masks: ``PredicateMask(f, monotone=True) & PredicateMask(g, monotone=True)``.

    Raises:
        TypeError: fn or bounds is no function, monotone is no bool, or one of them returns what is
            not described here.
        ValueError: both bounds and monotone are given.

    Example:
        >>> def every_other(b, h, q_index, k_index):
        ...     return (q_index - k_index) % 2 == 0
        >>> print(PredicateMask(every_other).to_array(2, 4).astype(int))
        [[1 0 1 0]
         [0 1 0 1]]
        >>> from flash_jax import block_schedule
        >>> causal = PredicateMask(lambda b, h, q_index, k_index: q_index >= k_index, monotone=True)
        >>> block_schedule(causal, 6, 6, (2, 2)).counts
        {'full': 3, 'partial': 3, 'skipped': 3}
    """

    fn: Callable[[Array, Array, Array, Array], Array]
    bounds: Callable[[Array, Array, Range, Range], tuple[Array, Array]] | None = None
    monotone: bool = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn of PredicateMask must be a function; it is {self.fn!r}")
        if not isinstance(self.monotone, bool):
            raise TypeError(f"monotone of PredicateMask must be a bool; it is {self.monotone!r}")
        given = self.bounds
        if not (given is None or callable(given)):
            raise TypeError(f"bounds of PredicateMask must be a function; it is {given!r}")
        if given is not None and self.monotone:
            raise ValueError("bounds of PredicateMask must be None where monotone is True")

    def keep(self, tile: QueryTile, j: Array) -> Array:
        kept = self.fn(tile.element_index, tile.n, tile.t, tile.s(j))
        return _as_bool("fn", kept, tile.shape())

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        full = (tile.heads, tile.groups, 1, tile.kv.count)
        b, h, t, s = tile.element_index, tile.n, tile.queries, tile.keys
        if self.monotone:
            ends = [x.reshape(1, 1, 1, 1) for x in t]
            corners = [_as_bool("fn", self.fn(b, h, q, k), full) for q in ends for k in s]
            return functools.reduce(operator.or_, corners), functools.reduce(operator.and_, corners)
        if self.bounds is None:
            unknown = jnp.full_like(s.first, True, dtype=bool)
            return unknown, ~unknown
        told = self.bounds(b, h, t, s)
        if not isinstance(told, tuple) or len(told) != 2:
            raise TypeError(
                "bounds of PredicateMask must return a pair of bools, (some, every); it returned "
                f"{type(told).__name__}"
            )
        some, every = (_as_bool("bounds", x, full) for x in told)
        return some, every


def _as_bool(name: str, kept: Any, full: tuple[int, ...]) -> Array:
    """What a function of ``PredicateMask`` has returned, as an array."""
    kind = np.bool_ if isinstance(kept, bool) else getattr(kept, "dtype", type(kept).__name__)
    if kind != np.bool_:
        raise TypeError(f"{name} of PredicateMask must return bool; it returned {kind}")
    kept = jnp.asarray(kept)
    sizes = zip(kept.shape[::-1], full[::-1], strict=False)
    if kept.ndim > 4 or any(n not in (1, m) for n, m in sizes):
        raise ValueError(
            f"{name} of PredicateMask must return what broadcasts with its indices to "
            f"{full}; it returned shape {kept.shape}"
        )
    return kept


def _keys(S: int) -> Array:
    """(1, S): the indices of the keys."""
    return lax.iota(np.int32, S)[None]


def _column(x: Any) -> Array:
    """A bound array (B or 1,) as (B or 1, 1)."""
    return jnp.asarray(x)[:, None]
