"""Arguments of the choice of blocks, checked."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._checks.numbers import as_block_sizes, as_reals, check_bool, natural_number, positive_integer
from .._checks.shapes import as_floats, check_qkv
from .._tiles.axis import BlockSizes
from .._tiles.symbolic import known

_METHODS = "antidiagonal", "pooled", "mincut"
_STRIDE = 16


class Choice(NamedTuple):
    """What is compiled in."""

    blocks: BlockSizes
    method: str
    is_causal: bool
    stride: int
    sinks: int
    band: int
    density: float | None
    top_p: float | None


def checked(
    query: Any,
    key: Any,
    scale: Any,
    method: Any,
    block_sizes: Any,
    is_causal: Any,
    stride: Any,
    sinks: Any = 0,
    band: Any = 0,
    density: Any = None,
    top_p: Any = None,
) -> tuple[Array, Array, Any, Choice]:
    """The arguments, checked; the arrays as constants, since a choice has no derivative."""
    query, key = as_floats(query=query, key=key)
    check_qkv(query, key, key)
    if not all(map(known, (query.shape[-3], key.shape[-3]))):
        raise NotImplementedError("query and key must have lengths that are no symbols")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; it is {method!r}")
    blocks = as_block_sizes(block_sizes)
    if method == "mincut":
        _check_mincut(query, key, blocks, top_p)
    divisor = math.gcd(*blocks)
    if stride is None:
        stride = math.gcd(_STRIDE, divisor)
    elif method != "antidiagonal":
        raise ValueError(f'stride must be None where method is not "antidiagonal"; it is {stride}')
    if divisor % positive_integer("stride", stride):
        raise ValueError(f"stride must divide both block sizes, {tuple(blocks)}; it is {stride}")
    for name, x in {"density": density, "top_p": top_p}.items():
        if x is None:
            continue
        if isinstance(x, bool) or not isinstance(x, numbers.Real):
            raise TypeError(f"{name} must be a number, known at trace time; it is {x!r}")
        if not 0 < float(x) <= 1:
            raise ValueError(f"{name} must be in (0, 1]; it is {x!r}")
    scale = as_reals("scale", scale)
    if np.shape(scale) != ():
        raise ValueError(f"scale must be a scalar; its shape is {np.shape(scale)}")
    scale = np.float32(query.shape[-1] ** -0.5) if scale is None else jnp.float32(scale)
    return (
        *lax.stop_gradient((query, key, scale)),
        Choice(
            blocks,
            method,
            check_bool("is_causal", is_causal),
            int(stride),
            natural_number("sinks", sinks),
            natural_number("band", band),
            None if density is None else float(density),
            None if top_p is None else float(top_p),
        ),
    )


def _check_mincut(query: Array, key: Array, blocks: BlockSizes, top_p: Any) -> None:
    """Parts are of one sequence: its queries and keys have the same blocks."""
    name = "with method='mincut'"
    if query.shape[-3] != key.shape[-3]:
        shapes = f"{query.shape} and {key.shape}"
        raise ValueError(f"query and key must be of one length {name}; their shapes are {shapes}")
    if blocks.q != blocks.kv:
        raise ValueError(f"block_sizes must be equal {name}; they are {tuple(blocks)}")
    if top_p is not None:
        raise ValueError(f"density must be given {name}, not top_p")


def check_share(choice: Choice) -> None:
    if (choice.density is None) == (choice.top_p is None):
        raise ValueError(
            "density or top_p must be given, and not both; they are "
            f"{choice.density} and {choice.top_p}"
        )
