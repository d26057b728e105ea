"""The cache of keys and values for decoding, which owns its layout: what ``attend`` reads.

Keys and values lie heads first, (B, K, S, H): few query rows are multiplied with them where they
lie, tiles of them are read by head, and a new token is K rows of H numbers to write, whatever S is.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._checks.numbers import known_values, positive_integer
from .._formats.slots import Appended, as_stored, written
from .any_cache import (
    AnyCache,
    as_floats,
    cache_type,
    counts,
    empty_arrays,
    rows_of,
    shortened,
    stored,
)
from .cache_arguments import (
    AXES_IN_ORDER,
    CachedArrays,
    as_cache_dtype,
    check_appended,
    indices_of_rows,
    row_integers,
)
from .explicit_axes import as_it_was, on_auto_axes


@cache_type(
    data_fields=[
        "keys",
        "values",
        "key_scales",
        "value_scales",
        "lengths",
        "begin",
        "offset",
        "first",
    ],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache(AnyCache):
    """Keys and values of the tokens so far, for ``attend``. A pytree; methods return a new one.

    Under ``jit`` with the cache donated, in ``lax.scan`` and in ``lax.while_loop`` tokens are
    appended in place. (jaxlib 0.10 copies a cache of bfloat16.)

    A token beyond the last slot is an error where lengths are known, outside ``jit``. Inside it is
    not stored, the length counts it all the same, and every query that should read it is NaN.

    Attributes:
        lengths: int32 (B,), tokens so far: the position of each row's next one.
        begin: int32 (B,), tokens before the last ``append``.
        offset: int32 (B,), the position of column 0 of the last ``append``: ``begin``, or before it
            where there is padding on the left.
        window: how many positions a query reads, its own included; None: all.
        keys: (B, K, S, H), as they are stored.
        values: (B, K, S, Hv), alike.
        key_scales: float32 (B, K, S) of int8, else None.
        value_scales: alike.
        first: int32 (B,), the first position that is still held.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_jax import attend
        >>> cache = KVCache.empty(1, 16, kv_heads=2, head_dim=8)
        >>> x = jnp.ones((1, 3, 2, 8))
        >>> cache = cache.append(x, x)
        >>> attend(x, cache).shape, cache.lengths.tolist()
        ((1, 3, 2, 8), [3])
    """

    keys: Array
    values: Array
    key_scales: Array | None
    value_scales: Array | None
    lengths: Array
    begin: Array
    offset: Array
    first: Array
    window: int | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: DTypeLike = np.float32,
        window: int | None = None,
    ) -> KVCache:
        """A cache without tokens.

        Args:
            batch: B, rows.
            length: S, slots of a row.
            kv_heads: K.
            head_dim: H of keys.
            value_dim: Hv of values; default: H.
            dtype: what is stored: float32, bfloat16, float16, float64, or int8 with a float32 scale
                per token and head.
            window: W <= length: each query reads the last W positions only, its own included. The
                slots are a ring, and tokens may go on for ever. T tokens at a time need
                W + T - 1 slots.

        Raises:
            ValueError: a size is not positive, the dtype is none of these, or window > length.
            TypeError: a size is no integer.

        Example:
            >>> KVCache.empty(1, 16, kv_heads=2, head_dim=8, dtype="int8").nbytes
            768
        """
        sizes = dict(batch=batch, length=length, kv_heads=kv_heads, head_dim=head_dim)
        B, S, K, H = (positive_integer(name, size) for name, size in sizes.items())
        Hv = H if value_dim is None else positive_integer("value_dim", value_dim)
        if window is not None:
            window = positive_integer("window", window)
            if window > S:
                raise ValueError(f"window must be at most length, {S}; it is {window}")
        dtype = as_cache_dtype(dtype)
        names = "lengths", "begin", "offset", "first"
        return cls(**empty_arrays((B, K, S, H), Hv, dtype, B, names), window=window)

    @property
    def slots(self) -> int:
        """S, how many positions a row holds."""
        return self.keys.shape[2]

    def append(
        self,
        key: ArrayLike,
        value: ArrayLike,
        lengths: ArrayLike | None = None,
        *,
        left_padded: bool = False,
    ) -> KVCache:
        """The cache with T more tokens, each row's behind those that it has.

        Args:
            key: (B, T, K, H) float; rounded to what the cache stores.
            value: (B, T, K, Hv), dtype of key.
            lengths: int32 (B,), how many of the T are tokens; the rest is padding, and is not
                stored. Default: all.
            left_padded: the padding is on the left.

        Raises:
            ValueError: shapes or dtypes disagree, lengths are not in 0..T, or a row overflows,
                where these are known.
            TypeError: an argument is of the wrong kind.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((2, 3, 2, 8))
            >>> cache = KVCache.empty(2, 16, kv_heads=2, head_dim=8).append(x, x, [3, 1])
            >>> cache.append(x, x).lengths.tolist()
            [6, 4]
        """
        (B, K, S, H), Hv = self.keys.shape, self.values.shape[-1]
        key, value, count = check_appended(key, value, lengths, left_padded, (B, K, H, Hv))
        if self.window is None:  # else the slots are a ring, which has room
            _check_room(self.lengths, key.shape[1] if count is None else count, S)
        append = functools.partial(_append, left_padded=left_padded)
        return as_it_was(append, self, key, value, count)

    def truncate(self, lengths: ArrayLike) -> KVCache:
        """The cache without the tokens from ``lengths`` on, as after speculation.

        Args:
            lengths: int32 (B,) or a scalar, >= 0; a row that is shorter stays as it is.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((2, 3, 2, 8))
            >>> cache = KVCache.empty(2, 16, kv_heads=2, head_dim=8).append(x, x, [3, 1])
            >>> cache.truncate(2).lengths.tolist()
            [2, 1]
        """
        lengths = row_integers("lengths", lengths, self.lengths.shape[0])
        return dataclasses.replace(self, **_shortened(counts(self), lengths))

    def reorder(self, rows: ArrayLike) -> KVCache:
        """The cache whose row b is row ``rows[b]`` of this one, as in beam search. It is a copy.

        Args:
            rows: indices, as many as the new cache is to have rows.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((2, 3, 2, 8))
            >>> cache = KVCache.empty(2, 16, kv_heads=2, head_dim=8).append(x, x, [3, 1])
            >>> cache.reorder([1, 1, 0]).lengths.tolist()
            [1, 1, 3]
        """
        rows = indices_of_rows("rows", rows, self.lengths.shape[0])
        return rows_of(self, rows)

    def to_arrays(self) -> CachedArrays:
        """The keys and values that are held, in order of position; zero where there is none.

        Returns:
            key (B, S, K, H) and value (B, S, K, Hv), float32 of int8, and first (B,): key i of a
            row has position ``first + i``.

        Example:
            >>> import jax.numpy as jnp
            >>> x = jnp.ones((2, 3, 2, 8))
            >>> cache = KVCache.empty(2, 16, kv_heads=2, head_dim=8).append(x, x)
            >>> cache.to_arrays().key.shape
            (2, 16, 2, 8)
        """
        return on_auto_axes(_in_order, "BKS.", AXES_IN_ORDER, self.keys, self)


def _check_room(lengths: Array, count: Array | int, slots: int) -> None:
    """Where lengths are known, tokens that find no slot are an error."""
    known = known_values((lengths, count))
    after = None if known is None else np.add(*known)
    if after is not None and np.any(after > slots):
        raise ValueError(
            f"the cache must have slots for all tokens; it has {slots}, and with these the "
            f"lengths would be {after.tolist()}"
        )


@jax.jit
def _shortened(counts: dict[str, Array], lengths: Array) -> dict[str, Array]:
    counts = shortened(counts, lengths)
    # What is not held is missing in a window around it, but for an empty row.
    first = jnp.minimum(counts["first"], counts["lengths"])
    return counts | {"first": jnp.where(counts["lengths"] == 0, 0, first)}


@jax.jit
def _in_order(_: Array, cache: KVCache) -> CachedArrays:
    first = jnp.maximum(cache.lengths - cache.slots, 0)
    first = jnp.zeros_like(first) if cache.window is None else first
    position = first[:, None] + lax.iota(np.int32, cache.slots)[None]
    held = (position >= cache.first[:, None]) & (position < cache.lengths[:, None])

    def row(x: Array, first: Array, held: Array) -> Array:
        x = jnp.roll(x, -first % cache.slots, axis=1)
        return jnp.where(held[:, None, None], jnp.swapaxes(x, 0, 1), 0)

    key, value = (jax.vmap(row)(x, first, held) for x in as_floats(cache))
    return CachedArrays(key, value, first)


@functools.partial(jax.jit, static_argnames="left_padded")
def _append(
    cache: KVCache, key: Array, value: Array, count: Array | None, left_padded: bool
) -> KVCache:
    new = Appended.of(key.shape[1], cache.lengths, count, left_padded)
    slot = new.slots(cache.slots, ring=cache.window is not None)
    added = as_stored(key, value, cache.keys.dtype)
    arrays = {name: written(x, added[name], slot) for name, x in stored(cache).items()}
    first = cache.first
    if cache.window is not None:
        first = jnp.maximum(first, new.end - cache.slots)
    return dataclasses.replace(
        cache, **arrays, lengths=new.end, begin=cache.lengths, offset=new.offset, first=first
    )
