"""What a number format is to the passes: how it multiplies the tiles across from some queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

from jax import Array

from .._tiles.tile import QueryTile
from . import online_softmax as online
from .exp import exp


class Products(NamedTuple):
    """What the loop over the key tiles of one query tile multiplies."""

    scores: Callable[[Array], Array]  # j -> scale * q . k, (heads, rows, block_kv)
    values: Callable[[Array], Any]  # j -> v (heads, block_kv, Hv), or as weigh takes it
    weigh: Callable[[Array, Any], Array]  # p (heads, rows, block_kv), v -> p v (heads, rows, Hv)
    finish: Callable[[Array], Array]  # sums of p v (heads, rows, Hv) -> in the unit of the values
    absorb: Callable[..., online.State] = online.absorb  # (state, s, v, weigh, exp) -> state
    exp: Callable[[Array], Array] = exp
    floats: bool = True  # values may be NaN or infinite
    coarse: bool = False  # weigh rounds p to bfloat16 or less


class Format(Protocol):
    """A frozen dataclass: it is compared, and compiled in."""

    def products(self, operands: Any, plan: Any, tile: QueryTile, fused: bool = False) -> Products:
        """The products of one tile of queries.

        Args:
            fused: for one kernel per tile, of operations that XLA's library has (``kernel``).
        """
        ...


class FewFormat(Format, Protocol):
    """A format of few query rows, which are multiplied with all keys at once.

    Attributes:
        score_bytes: of temporaries, for every score of a step.
        least_queries: a step has at least so many, since all keys are read for it.
    """

    score_bytes: ClassVar[int]
    least_queries: ClassVar[int]
