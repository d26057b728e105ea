"""What one device of a mesh does of a call, and how that is joined with what the others do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax import Array, lax
from jax import numpy as jnp

from .._checks.shapes import accumulator
from .._tiles.layout import Layout
from .._tiles.tile import Origin
from .axes import Axes
from .division import Division
from .online_softmax import finite_shift
from .operands import flatten, unflatten


def on_a_device(
    name: str,
    run: Callable[..., list[Array]],
    leaves: Sequence[Array],
    static: dict[str, Any],
    axes: Axes,
    division: Division,
) -> list[Array]:
    """The parts of a primitive's results that a device has.

    Args:
        name: of the primitive.
        run: what it does on one device.
        leaves: the parts of its leaves.
        static: its parameters.
        axes: of leaves and results.
        division: of the axes over the mesh.
    """
    by_keys, plan = division.by["S"], static["plan"]
    leaves = [_own_heads(names, x, division) for names, x in zip(axes.leaves, leaves, strict=True)]
    own_leaves, own = _own(leaves, static, axes, division)
    if name != "attention":
        found = run(*own_leaves, **own)
        return [_summed(names, x, division) for names, x in zip(axes.results, found, strict=True)]
    if not by_keys:
        return run(*own_leaves, **own)
    # The output is rounded to its dtype when it is joined.
    own["plan"] = dataclasses.replace(own["plan"], lse=True, dtype=accumulator(plan.dtype))
    out, *statistics = _joined(run(*own_leaves, **own | {"statistics": True}), by_keys, plan.layout)
    return [out.astype(plan.dtype), *statistics][: len(axes.results)]


def _own(
    leaves: list[Array], static: dict[str, Any], axes: Axes, division: Division
) -> tuple[list[Array], dict[str, Any]]:
    """Leaves and parameters of a device's own call: it knows where in the whole one it begins."""
    tree, plan, calls = static["tree"], static["plan"], static["calls"]
    operands, rest = unflatten(tree, leaves)
    origin = [division.first(c) for c in "BNTS"]
    origin.append(jnp.int32(division.sizes["S"]))
    origin = (None if x is None else x.reshape((1,) * (calls + 1)) for x in origin)
    operands = operands._replace(origin=Origin(*origin))
    if division.by["S"] and operands.sinks is not None:  # which count once
        first = lax.axis_index(division.by["S"]) == 0
        sinks = jnp.where(first, operands.sinks, jnp.array(-jnp.inf, operands.sinks.dtype))
        operands = operands._replace(sinks=sinks)
    taken = division.read_heads
    plan = plan.of_part(
        B=plan.elements // division.count("B"),
        N=division.size("N"),
        K=division.size("K") if taken is None else taken[1],
        T=division.size("T"),
        S=division.size("S"),
    )
    ours, tree = flatten(operands)
    own = static | {"tree": tree, "plan": plan}
    if "entries" in static:
        own["entries"] = tuple(
            tuple(n // division.count(c) for c, n in zip(names, sizes, strict=False))
            for names, sizes in zip(axes.results, static["entries"], strict=True)
        )
    if "moving" in static:  # indices, behind what is new among the operands
        old, more = static["tree"].num_leaves, tree.num_leaves - static["tree"].num_leaves
        own["moving"] = tuple(i if i < old else i + more for i in static["moving"])
    return [*ours, *rest], own


def _own_heads(names: str, x: Array, division: Division) -> Array:
    """The key and value heads of x that the device's query heads read."""
    if division.read_heads is None or "K" not in names:
        return x
    return lax.dynamic_slice_in_dim(x, *division.read_heads, names.index("K"))


def _summed(names: str, x: Array, division: Division) -> Array:
    """A sum over the pairs of a device as one over all pairs."""
    if division.read_heads is not None and "K" in names:
        axis = names.index("K")
        shape = (*x.shape[:axis], division.size("K"), *x.shape[axis + 1 :])
        first = division.read_heads[0]
        x = lax.dynamic_update_slice_in_dim(jnp.zeros(shape, x.dtype), x, first, axis)
    over = division.summed(names)
    return lax.psum(x, over) if over else x


def _joined(results: Sequence[Array], by: tuple[str, ...], layout: Layout) -> list[Array]:
    """Out, lse, m and l (..., N, T) of all keys, from those of the keys of each device."""
    out, _, m, l = results
    top = lax.pmax(m, by)
    l = l * jnp.exp(m - finite_shift(top))
    total = lax.psum(l, by)
    empty = total == 0
    share = l / jnp.where(empty, 1, total)
    if layout is Layout.HEADS_LAST:
        share = jnp.swapaxes(share, -1, -2)
    out = lax.psum(share[..., None] * out, by)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))
    return [out, lse, top, total]
