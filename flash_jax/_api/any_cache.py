"""What caches of keys and values have in common, whatever their layout."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Self, TypeVar

import jax
import numpy as np
from jax import Array, export
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._formats.slots import as_floats_of
from .cache_arguments import chosen_rows
from .explicit_axes import as_it_was

A = TypeVar("A", bound="AnyCache")
C = TypeVar("C")
_STORED = ("keys", "values", "key_scales", "value_scales")
_COUNTS = ("table", "lengths", "begin", "offset", "first")


class AnyCache:
    """Keys and values of the tokens so far; scales of int8, else None."""

    keys: Array
    values: Array
    key_scales: Array | None
    value_scales: Array | None
    lengths: Array
    begin: Array
    offset: Array

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(x.nbytes for x in stored(self).values())

    def truncate(self, lengths: ArrayLike) -> Self:
        """The cache without the tokens from ``lengths`` on; see the caches."""
        raise NotImplementedError

    def reset(self, rows: ArrayLike | None = None) -> Self:
        """The cache with some rows empty, for other sequences. Their pages are free again.

        Args:
            rows: bool (B,), or indices of rows; default: all.

        Example:
            >>> import jax.numpy as jnp
            >>> from flash_jax import KVCache
            >>> x = jnp.ones((2, 3, 2, 8))
            >>> cache = KVCache.empty(2, 16, kv_heads=2, head_dim=8).append(x, x)
            >>> cache.reset([1]).lengths.tolist()
            [3, 0]
        """
        if rows is None:
            return self.truncate(0)
        chosen = chosen_rows("rows", rows, self.lengths.shape[0])
        return self.truncate(jnp.where(chosen, 0, self.lengths))


def cache_type(*, data_fields: list[str], meta_fields: list[str]) -> Callable[[type[A]], type[A]]:
    """Makes a frozen dataclass a pytree, also in serialized programs of ``jax.export``."""

    def registered(cls: type[A]) -> type[A]:
        jax.tree_util.register_dataclass(cls, data_fields, meta_fields)
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"flash_jax.{cls.__name__}",
            serialize_auxdata=lambda meta: json.dumps(meta).encode(),
            deserialize_auxdata=lambda meta: tuple(json.loads(meta)),
        )
        return cls

    return registered


def stored(cache: AnyCache) -> dict[str, Array]:
    """The arrays that hold tokens, by name."""
    given = {name: getattr(cache, name) for name in _STORED}
    return {name: x for name, x in given.items() if x is not None}


def counts(cache: AnyCache) -> dict[str, Array]:
    """The arrays that say how many tokens each row has and where they are, by name."""
    return {name: getattr(cache, name) for name in _COUNTS if hasattr(cache, name)}


def as_floats(cache: AnyCache) -> tuple[Array, Array]:
    """What the keys and values of a cache stand for."""
    keys, values = cache.keys, cache.values
    return as_floats_of(keys, cache.key_scales), as_floats_of(values, cache.value_scales)


def shortened(counts: dict[str, Array], lengths: Array) -> dict[str, Array]:
    """The counts of rows of which only ``lengths`` tokens are left, (B,)."""
    lengths = jnp.clip(lengths, 0, counts["lengths"])
    begin, offset = (jnp.minimum(counts[name], lengths) for name in ("begin", "offset"))
    return counts | {"lengths": lengths, "begin": begin, "offset": offset}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), inline=True)
def empty_arrays(
    shape: tuple[int, int, int, int],
    value_dim: int,
    dtype: np.dtype,
    rows: int,
    counts: tuple[str, ...],
) -> dict[str, Array | None]:
    """Those of a cache without tokens, by name: keys of that shape, and counts of rows."""
    scales = (jnp.zeros(shape[:3], np.float32) if dtype == np.int8 else None for _ in "kv")
    arrays = jnp.zeros(shape, dtype), jnp.zeros((*shape[:3], value_dim), dtype), *scales
    # Each its own array: one that is donated twice is an error.
    none = {name: jnp.zeros((rows,), np.int32) for name in counts}
    return dict(zip(_STORED, arrays, strict=True)) | none


def rows_of(tree: C, rows: Array) -> C:
    """Some rows of arrays (B, ...)."""
    return as_it_was(_taken, tree, rows)


@jax.jit
def _taken(tree: C, rows: Array) -> C:
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), tree)
