"""A cache whose rows share a pool of pages: each takes as many as it has tokens for.

Pages are taken and given back by a free list that is a function of the tables: a page is free where
no row's table names it, so that none is ever lost. Rows that name one page share it, until one of
them appends to it: then it takes a copy.

Kwon et al., PagedAttention, 2023, section 4, https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._checks.numbers import known_values, positive_integer
from .._formats.page_table import copied, users, with_pages, written_in_pages
from .._formats.slots import Appended, as_floats_of, as_stored
from .any_cache import AnyCache, cache_type, counts, empty_arrays, rows_of, shortened, stored
from .cache_arguments import (
    AXES_IN_ORDER,
    CachedArrays,
    as_cache_dtype,
    check_appended,
    indices_of_rows,
    row_integers,
)
from .explicit_axes import as_it_was, on_auto_axes

A = TypeVar("A", Array, np.ndarray)


@cache_type(
    data_fields=[
        "keys",
        "values",
        "key_scales",
        "value_scales",
        "table",
        "lengths",
        "begin",
        "offset",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PagedKVCache(AnyCache):
    """``KVCache`` in pages: rows of any length share one pool of memory, and rows share pages.

    A pytree; methods return a new one. ``append``, ``reorder``, ``truncate`` and ``reset`` take and
    give back pages, under ``jit``, too, and ``append`` writes in place where ``KVCache`` does.

    A token for which there is no page is an error where lengths are known, outside ``jit``. Inside
    it is not stored, the length counts it all the same, and every query that should read it is NaN.

    Attributes:
        lengths: int32 (B,), tokens so far: the position of each row's next one.
        begin: int32 (B,), tokens before the last ``append``.
        offset: int32 (B,), the position of column 0 of the last ``append``.
        table: int32 (B, M), the pages of each row in order; -1: none.
        keys: (pages, K, P, H), the pool.
        values: (pages, K, P, Hv), alike.
        key_scales: float32 (pages, K, P) of int8, else None.
        value_scales: alike.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_jax import attend
        >>> cache = PagedKVCache.empty(2, 64, kv_heads=2, head_dim=8, pages=6, page_size=16)
        >>> x = jnp.ones((2, 20, 2, 8))
        >>> cache = cache.append(x, x, [20, 3])
        >>> attend(x, cache).shape, cache.free_pages.tolist()
        ((2, 20, 2, 8), 3)
    """

    keys: Array
    values: Array
    key_scales: Array | None
    value_scales: Array | None
    table: Array
    lengths: Array
    begin: Array
    offset: Array

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        kv_heads: int,
        head_dim: int,
        *,
        pages: int,
        page_size: int = 64,
        value_dim: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> PagedKVCache:
        """A cache without tokens.

        Args:
            batch: B, rows.
            length: how many tokens a row may have at the most; rounded up to whole pages.
            kv_heads: K.
            head_dim: H of keys.
            pages: of the pool.
            page_size: P, tokens of a page.
            value_dim: Hv of values; default: H.
            dtype: what is stored, as in ``KVCache``.

        Raises:
            ValueError: a size is not positive, or the dtype is none of these.
            TypeError: a size is no integer.

        Example:
            >>> PagedKVCache.empty(2, 64, 2, 8, pages=6, page_size=16).table.shape
            (2, 4)
        """
        sizes = dict(
            batch=batch,
            length=length,
            kv_heads=kv_heads,
            head_dim=head_dim,
            pages=pages,
            page_size=page_size,
        )
        B, S, K, H, n, P = (positive_integer(name, size) for name, size in sizes.items())
        Hv = H if value_dim is None else positive_integer("value_dim", value_dim)
        dtype = as_cache_dtype(dtype)
        names = "lengths", "begin", "offset"
        table = jnp.full((B, -(-S // P)), -1, np.int32)
        return cls(**empty_arrays((n, K, P, H), Hv, dtype, B, names), table=table)

    @property
    def page_size(self) -> int:
        """P, tokens of a page."""
        return self.keys.shape[2]

    @property
    def slots(self) -> int:
        """How many tokens a row may have at the most."""
        return self.table.shape[1] * self.page_size

    @property
    def free_pages(self) -> Array:
        """How many pages no row has, int32."""
        free = functools.partial(_free_pages, pages=self.keys.shape[0])
        return on_auto_axes(free, "", "", self.table)

    @property
    def held(self) -> Array:
        """How many tokens each row has pages for, int32 (B,)."""
        return _held(self.table, self.page_size)

    def append(
        self,
        key: ArrayLike,
        value: ArrayLike,
        lengths: ArrayLike | None = None,
        *,
        left_padded: bool = False,
    ) -> PagedKVCache:
        """The cache with T more tokens, as ``KVCache.append``.

        Raises:
            ValueError: shapes or dtypes disagree, lengths are not in 0..T, or there are too few
                pages, where these are known.
            TypeError: an argument is of the wrong kind.

        Example:
            >>> import jax.numpy as jnp
            >>> cache = PagedKVCache.empty(1, 64, 2, 8, pages=6, page_size=16)
            >>> x = jnp.ones((1, 3, 2, 8))
            >>> cache.append(x, x, [2]).lengths.tolist()
            [2]
        """
        _, K, P, H = self.keys.shape
        sizes = self.lengths.shape[0], K, H, self.values.shape[-1]
        key, value, count = check_appended(key, value, lengths, left_padded, sizes)
        append = functools.partial(_append, left_padded=left_padded)
        cache = as_it_was(append, self, key, value, count)
        values = known_values(counts(cache))
        if values is not None and np.any(values["lengths"] > _held(values["table"], P)):
            raise ValueError(
                f"the cache must have pages for all tokens; with these the lengths would be "
                f"{values['lengths'].tolist()}, of at most {self.slots}, and "
                f"{int(self.free_pages)} of {self.keys.shape[0]} pages of {P} are free"
            )
        return cache

    def truncate(self, lengths: ArrayLike) -> PagedKVCache:
        """The cache without the tokens from ``lengths`` on, whose pages are free again.

        Args:
            lengths: int32 (B,) or a scalar, >= 0; a row that is shorter stays as it is.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((1, 20, 2, 8))
            >>> cache = PagedKVCache.empty(1, 64, 2, 8, pages=6, page_size=16).append(x, x)
            >>> cache.free_pages.tolist(), cache.truncate(3).free_pages.tolist()
            (4, 5)
        """
        lengths = row_integers("lengths", lengths, self.lengths.shape[0])
        return dataclasses.replace(self, **_shortened(counts(self), lengths, self.page_size))

    def reorder(self, rows: ArrayLike) -> PagedKVCache:
        """The cache whose row b is row ``rows[b]`` of this one: they share pages, without a copy.

        So rows share a prefix: append it to row 0, and take ``reorder([0, 0, 0, 0])``.

        Args:
            rows: indices, as many as the new cache is to have rows.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((2, 3, 2, 8))
            >>> cache = PagedKVCache.empty(2, 64, 2, 8, pages=6).append(x, x, [3, 0])
            >>> cache = cache.reorder([0, 0])
            >>> cache.table[:, 0].tolist(), cache.free_pages.tolist()
            ([0, 0], 5)
        """
        rows = indices_of_rows("rows", rows, self.lengths.shape[0])
        return dataclasses.replace(self, **rows_of(counts(self), rows))

    def to_arrays(self) -> CachedArrays:
        """The keys and values of every row, a copy, as ``KVCache.to_arrays``.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((1, 3, 2, 8))
            >>> PagedKVCache.empty(1, 64, 2, 8, pages=6).append(x, x).to_arrays().key.shape
            (1, 64, 2, 8)
        """
        return on_auto_axes(_in_order, "pKPH", AXES_IN_ORDER, self.keys, self)


def _held(table: A, page_size: int) -> A:
    """How many tokens the pages of each row hold, (B,); of JAX or NumPy."""
    return (table >= 0).cumprod(axis=1).sum(axis=1, dtype=np.int32) * np.int32(page_size)


@functools.partial(jax.jit, static_argnames="pages")
def _free_pages(table: Array, pages: int) -> Array:
    return jnp.sum(users(table, pages) == 0, dtype=np.int32)


@functools.partial(jax.jit, static_argnums=2)
def _shortened(counts: dict[str, Array], lengths: Array, page_size: int) -> dict[str, Array]:
    counts = shortened(counts, lengths)
    page = lax.iota(np.int32, counts["table"].shape[1])[None]
    kept = page * np.int32(page_size) < counts["lengths"][:, None]
    return counts | {"table": jnp.where(kept, counts["table"], -1)}


@jax.jit
def _in_order(_: Array, cache: PagedKVCache) -> CachedArrays:
    position = lax.iota(np.int32, cache.slots)[None]
    held = (position < jnp.minimum(cache.lengths, cache.held)[:, None])[..., None, None]
    keys, values, *scales = gathered(cache)
    parts = map(as_floats_of, (keys, values), scales)
    key, value = (jnp.where(held, jnp.swapaxes(x, 1, 2), 0) for x in parts)
    return CachedArrays(key, value, jnp.zeros_like(cache.lengths))


def gathered(cache: PagedKVCache) -> tuple[Array, Array, Array | None, Array | None]:
    """Keys and values (B, K, S, H) of every row, and their scales (B, K, S), a copy."""
    table = jnp.maximum(cache.table, 0)

    def of(x: Array | None) -> Any:
        if x is None:
            return None
        pages = jnp.moveaxis(jnp.take(x, table, axis=0, mode="clip"), 2, 1)  # (B, K, M, P, ...)
        return pages.reshape(*pages.shape[:2], cache.slots, *pages.shape[4:])

    return of(cache.keys), of(cache.values), of(cache.key_scales), of(cache.value_scales)


@functools.partial(jax.jit, static_argnames="left_padded")
def _append(
    cache: PagedKVCache, key: Array, value: Array, count: Array | None, left_padded: bool
) -> PagedKVCache:
    new = Appended.of(key.shape[1], cache.lengths, count, left_padded)
    table, copies = with_pages(
        cache.table, cache.keys.shape[0], cache.page_size, cache.lengths, new
    )
    pools, added = copied(copies, stored(cache)), as_stored(key, value, cache.keys.dtype)
    return dataclasses.replace(
        cache,
        **{name: written_in_pages(pool, added[name], table, new) for name, pool in pools.items()},
        table=table,
        lengths=new.end,
        begin=cache.lengths,
        offset=new.offset,
    )
