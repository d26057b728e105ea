"""A cache whose rows share a pool of pages: each takes as many as it has tokens for.

Pages are taken and given back by a free list that is a function of the tables: a page is free where
no row's table names it, so that none is ever lost. Rows that name one page share it, until one of
them appends to it: then it takes a copy.

Kwon et al., PagedAttention, 2023, section 4, https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._checks.numbers import positive_integer
from .._formats.page_table import copied, users, with_pages, written_in_pages
from .._formats.slots import Appended
from .cache_arguments import (
    CachedArrays,
    as_cache_dtype,
    check_appended,
    chosen_rows,
    indices_of_rows,
    is_known,
    row_integers,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "table", "lengths", "begin", "offset"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PagedKVCache:
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
            dtype: what is stored: float32, bfloat16, float16 or float64.

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
        if dtype == np.int8:
            raise ValueError("dtype must be a float of a cache in pages; it is int8")
        return cls(
            jnp.zeros((n, K, P, H), dtype),
            jnp.zeros((n, K, P, Hv), dtype),
            jnp.full((B, -(-S // P)), -1, np.int32),
            *(jnp.zeros((B,), np.int32) for _ in range(3)),
        )

    @property
    def page_size(self) -> int:
        """P, tokens of a page."""
        return self.keys.shape[2]

    @property
    def slots(self) -> int:
        """How many tokens a row may have at the most."""
        return self.table.shape[1] * self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def free_pages(self) -> Array:
        """How many pages no row has, int32."""
        return jnp.sum(users(self.table, self.keys.shape[0]) == 0, dtype=np.int32)

    @property
    def held(self) -> Array:
        """How many tokens each row has pages for, int32 (B,)."""
        return self.page_size * jnp.sum(jnp.cumprod(self.table >= 0, axis=1), 1, dtype=np.int32)

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
        _, K, _, H = self.keys.shape
        sizes = self.lengths.shape[0], K, H, self.values.shape[-1]
        key, value, count = check_appended(self, key, value, lengths, left_padded, sizes)
        cache = _append(self, key, value, count, left_padded)
        if is_known(cache.lengths) and bool(jnp.any(cache.lengths > cache.held)):
            raise ValueError(
                f"the cache must have pages for all tokens; with these the lengths would be "
                f"{cache.lengths.tolist()}, of at most {self.slots}, and "
                f"{int(self.free_pages)} of {self.keys.shape[0]} pages of {self.page_size} are free"
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
        lengths = jnp.clip(lengths, 0, self.lengths)
        page = lax.iota(np.int32, self.table.shape[1])[None]
        kept = page * np.int32(self.page_size) < lengths[:, None]
        return dataclasses.replace(
            self,
            table=jnp.where(kept, self.table, -1),
            lengths=lengths,
            begin=jnp.minimum(self.begin, lengths),
            offset=jnp.minimum(self.offset, lengths),
        )

    def reset(self, rows: ArrayLike | None = None) -> PagedKVCache:
        """The cache with some rows empty, as ``KVCache.reset``; their pages are free again.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((2, 3, 2, 8))
            >>> cache = PagedKVCache.empty(2, 64, 2, 8, pages=6).append(x, x)
            >>> cache.reset([1]).lengths.tolist()
            [3, 0]
        """
        chosen = chosen_rows("rows", rows, self.lengths.shape[0])
        return self.truncate(jnp.where(chosen, 0, self.lengths))

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
        names = "table", "lengths", "begin", "offset"
        taken = {name: jnp.take(getattr(self, name), rows, axis=0, mode="clip") for name in names}
        return dataclasses.replace(self, **taken)

    def to_arrays(self) -> CachedArrays:
        """The keys and values of every row, a copy, as ``KVCache.to_arrays``.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((1, 3, 2, 8))
            >>> PagedKVCache.empty(1, 64, 2, 8, pages=6).append(x, x).to_arrays().key.shape
            (1, 64, 2, 8)
        """
        position = lax.iota(np.int32, self.slots)[None]
        held = (position < jnp.minimum(self.lengths, self.held)[:, None])[..., None, None]
        parts = (jnp.swapaxes(x, 1, 2) for x in gathered(self))
        key, value = (jnp.where(held, x, 0) for x in parts)
        return CachedArrays(key, value, jnp.zeros_like(self.lengths))


def gathered(cache: PagedKVCache) -> tuple[Array, Array]:
    """Keys and values (B, K, S, H) of every row, a copy."""
    table = jnp.maximum(cache.table, 0)

    def of(x: Array) -> Array:
        pages = jnp.moveaxis(jnp.take(x, table, axis=0, mode="clip"), 2, 1)  # (B, K, M, P, H)
        return pages.reshape(*pages.shape[:2], cache.slots, -1)

    return of(cache.keys), of(cache.values)


@functools.partial(jax.jit, static_argnames="left_padded")
def _append(
    cache: PagedKVCache, key: Array, value: Array, count: Array, left_padded: bool
) -> PagedKVCache:
    new = Appended.of(key.shape[1], cache.lengths, count, left_padded)
    table, copies = with_pages(
        cache.table, cache.keys.shape[0], cache.page_size, cache.lengths, new
    )
    keys, values = copied(copies, (cache.keys, cache.values))
    put = functools.partial(written_in_pages, table=table, new=new)
    return dataclasses.replace(
        cache,
        keys=put(keys, key),
        values=put(values, value),
        table=table,
        lengths=new.end,
        begin=cache.lengths,
        offset=new.offset,
    )
