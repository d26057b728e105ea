"""What a mask is: which query may read which key, in O(T + S) memory.

A mask answers two questions about a tile of queries, and builds no (T, S) array for either:
    keep    inside one tile: may query t read key s?
    tiles   of every key tile: is some pair kept, is every pair kept? A tile without a kept pair is
            skipped, and a tile that keeps every pair needs no mask work.
``read_keys`` answers a third one about all queries at once: which keys does any of them read?
Masks are pytrees: their arrays may be traced, batched by ``vmap`` and passed to jitted functions.

A new mask is a file in this folder: a subclass of ``Mask`` under ``mask_type`` that names its
arrays and has ``keep``, ``tiles`` and, if some keys may have no reader, ``read_keys``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import numpy as np
from jax import Array, export
from jax import numpy as jnp

from .._checks.bind import Sizes, bind_integers
from .._checks.numbers import as_option, check_integers, natural_number, positive_integer
from .._tiles.axis import Axis, BlockSizes
from .._tiles.symbolic import pad_axes
from .._tiles.tile import QueryTile

M = TypeVar("M", bound=type)

_OPERATORS: dict[Any, str] = {operator.and_: "and", operator.or_: "or"}
_NAMED: dict[Any, Any] = {name: operator_ for operator_, name in _OPERATORS.items()}


class Mask:
    """Which pairs of query and key are kept; the base of all masks.

    ``a & b`` keeps the pairs that both keep, ``a | b`` those that either keeps.

    A mask is bound before it is used: ``bind`` checks the arrays against the sizes of a call and
    gives each a first axis of size B or 1. ``keep`` and ``tiles`` then read them through a
    ``QueryTile``.

    Example:
        >>> from flash_jax import CausalMask, LengthMask, PrefixMask
        >>> prefix_lm = PrefixMask(2) | CausalMask()
        >>> print((prefix_lm & LengthMask(kv=3)).to_array(4, 4).astype(int))
        [[1 1 0 0]
         [1 1 0 0]
         [1 1 1 0]
         [1 1 1 0]]
    """

    arrays: ClassVar[dict[str, str]] = {}  # the fields that hold arrays, and their axes but B
    optional: ClassVar[bool] = False  # whether the arrays may be None
    masks: ClassVar[tuple[str, ...]] = ()  # the fields that hold masks

    def __post_init__(self) -> None:
        for name in self.arrays:
            x = getattr(self, name)
            if isinstance(x, list):  # as a pytree it would be taken apart
                x = as_option(f"{type(self).__name__}.{name}", x)
                object.__setattr__(self, name, x)
            check_integers(f"{type(self).__name__}.{name}", x)

    def bind(self, sizes: Sizes) -> Mask:
        """The mask with its arrays checked; errors name them as ``CausalMask.offset``."""
        bound = {
            name: bind_integers(f"{type(self).__name__}.{name}", getattr(self, name), axes, sizes)
            for name, axes in self.arrays.items()
            if not (self.optional and getattr(self, name) is None)
        }
        return dataclasses.replace(self, **bound)  # pyright: ignore[reportArgumentType]

    def padded(self, missing: dict[str, Any]) -> Mask:
        """The bound mask, its arrays' axes T and S longer by ``missing`` zeros."""
        arrays = {name: getattr(self, name) for name in self.arrays}
        padded = {
            name: pad_axes(x, ("B" + self.arrays[name])[-x.ndim :], missing)
            for name, x in arrays.items()
            if x is not None
        }
        padded |= {name: getattr(self, name).padded(missing) for name in self.masks}
        return dataclasses.replace(self, **padded)  # pyright: ignore[reportArgumentType]

    def array_axes(self) -> list[str]:
        """The axes of the bound mask's arrays, such as "BT", in the order of its leaves."""
        axes = []
        for name in (field.name for field in dataclasses.fields(self)):  # pyright: ignore
            x = getattr(self, name)
            if name in self.masks:
                axes += x.array_axes()
            elif name in self.arrays and x is not None:
                axes.append("B" + self.arrays[name])
        return axes

    def keep(self, tile: QueryTile, j: Array) -> Array:
        """Whether the pairs of key tile j are kept: bool, broadcastable to ``tile.shape()``."""
        raise NotImplementedError

    def tiles(self, tile: QueryTile) -> tuple[Array, Array]:
        """(some, every) of each key tile: bool, broadcastable to (heads, groups, 1, key tiles).

        ``some`` is False only where no pair is kept, ``every`` is True only where all are.
        """
        raise NotImplementedError

    @property
    def blocks(self) -> BlockSizes | None:
        """The tiles that suit the mask, where it is made of blocks; None: others do as well."""
        return None

    def listed(self, tile: QueryTile) -> Array | None:
        """(heads or 1, n) int32: the key tiles in which a key/value head may keep some pair.

        -1 for none; in any order, and a tile may be there twice. None: it may be any tile.
        """
        return None

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
        """Raises: ``a and b`` would be b alone, without a word."""
        raise TypeError(
            f"{type(self).__name__} must not be used as a bool: combine masks by & and |, not by "
            "`and`, `or` and `not`, and compare one with None by `is`"
        )

    @property
    def ndim(self) -> int:
        """Missing, as ``hasattr`` says: in decoding, Flax asks a mask for it first."""
        raise AttributeError(
            f"{type(self).__name__} must not be used as an array, and has no ndim: it describes "
            "which query reads which key. Flax's decode=True combines the mask of its cache, which "
            "is causal already, with arrays only: leave mask out, or pass a bool array"
        )

    def to_array(self, T: int, S: int, *, batch: int = 0, head: int = 0) -> Array:
        """The mask of one batch element and one query head as bool (T, S), to look at.

        Raises:
            ValueError: a size is not positive, the mask's arrays do not fit T and S, or the mask
                has no such batch element.
            TypeError: a size or an index is no integer.

        Example:
            >>> from flash_jax import CausalMask
            >>> CausalMask().to_array(2, 2).tolist()
            [[True, False], [True, True]]
        """
        T, S = positive_integer("T", T), positive_integer("S", S)
        return _as_array(self, place_of(self, T, S, batch, head), T, S)


@dataclass_transform(frozen_default=True)
def mask_type(cls: M) -> M:
    """The class as a frozen dataclass and pytree: arrays and masks are traced, the rest static."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    data = [name for name in names if name in cls.arrays or name in cls.masks]
    jax.tree_util.register_dataclass(cls, data, [name for name in names if name not in data])
    # An exported function may take any mask but a PredicateMask, whose function has no text.
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"flash_jax.{cls.__name__}",
        serialize_auxdata=lambda static: json.dumps(
            [_OPERATORS.get(x, x) for x in static]
        ).encode(),
        deserialize_auxdata=lambda text: tuple(map(_static, json.loads(text))),
    )
    return cls


def _static(x: Any) -> Any:
    """What is no array in a mask, from what JSON makes of it."""
    return tuple(x) if isinstance(x, list) else _NAMED.get(x, x)


@mask_type
class CombinedMask(Mask):
    """``a & b`` or ``a | b``: its answers about tiles are those of a and b, combined."""

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

    @property
    def blocks(self) -> BlockSizes | None:
        return self.a.blocks or self.b.blocks

    def listed(self, tile: QueryTile) -> Array | None:
        a, b = self.a.listed(tile), self.b.listed(tile)
        if self.op is operator.and_:
            return b if a is None else a
        if a is None or b is None:
            return None
        heads = max(a.shape[0], b.shape[0])
        both = (jnp.broadcast_to(x, (heads, x.shape[1])) for x in (a, b))
        return jnp.concatenate([*both], axis=1)

    def read_keys(self, T: int, S: int) -> Array:
        return self.op(self.a.read_keys(T, S), self.b.read_keys(T, S))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _as_array(mask: Mask, place: tuple[Any, Any], T: int, S: int) -> Array:
    bound, tile = first_tile(mask, place, T, S, (T, S))
    assert bound is not None
    return jnp.broadcast_to(bound.keep(tile, jnp.int32(0)), tile.shape())[0, 0]


def place_of(mask: Mask | None, T: int, S: int, batch: int, head: int) -> tuple[Any, Any]:
    """A batch element and a query head, or an error: the mask has no such one."""
    batch, head = natural_number("batch", batch), natural_number("head", head)
    arrays = []
    if mask is not None:
        bound = jax.eval_shape(lambda: mask.bind(Sizes(T=T, S=S)))
        arrays = [*zip(bound.array_axes(), jax.tree.leaves(bound), strict=True)]
    B = max((x.shape[0] for _, x in arrays), default=1)
    if B > 1 and batch >= B:
        raise ValueError(f"batch must be below the mask's batch size, {B}; it is {batch}")
    N = max((x.shape[1] for axes, x in arrays if axes[1:2] == "N"), default=1)
    if N > 1 and head >= N:
        raise ValueError(f"head must be below the mask's heads, {N}; it is {head}")
    return np.int32(batch), np.int32(head)


def first_tile(
    mask: Mask | None, place: tuple[Any, Any], T: int, S: int, blocks: tuple[int, int]
) -> tuple[Mask | None, QueryTile]:
    """The bound mask and the first tile of queries of one batch element and one query head."""
    element, head = place
    bound = None if mask is None else mask.bind(Sizes(T=T, S=S))
    B = max((x.shape[0] for x in jax.tree.leaves(bound)), default=1)
    at = (element % np.int32(B), B, element, B, head, 1, 1, jnp.int32(0))
    return bound, QueryTile(Axis.of(T, blocks[0]), Axis.of(S, blocks[1]), *at)
