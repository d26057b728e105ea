"""The axes of a call by name, for every leaf and every result of a primitive.

    B  batch elements    N  query heads    K  key and value heads    T  queries    S  keys

and a, b, c for mapped axes, outermost last. A name is a string with a letter per axis of an array,
and "." for an axis that has size 1 there, or that nothing else shares, such as the head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from .._tiles.layout import Layout
from .calls import lead, merged_shapes
from .operands import Differentiable, Dimensions, Operands, Quantization, flatten, unflatten
from .plan import Plan
from .scores import Scores


class Axes(NamedTuple):
    """Of a call of a primitive."""

    leaves: list[str]
    results: list[str]
    sizes: dict[str, int]


def axes_of(
    name: str, leaves: Sequence[Any], results: Sequence[Any], static: dict[str, Any]
) -> Axes | None:
    """The axes of a primitive by its name, its leaves and results, and its parameters.

    None where an operand has no names here.
    """
    calls, plan = static["calls"], static["plan"]
    operands, _ = unflatten(static["tree"], merged_shapes(leaves, calls))
    mapped, dims = "".join(chr(ord("a") + i) for i in range(calls)), Dimensions.of(operands, plan)
    sizes = dict(zip((*mapped, "B"), lead(leaves, calls), strict=True))
    sizes |= {"N": dims.N, "K": dims.K, "T": dims.T, "S": dims.S}
    named = operand_axes(operands, plan)
    more, found = _others(name.removesuffix("_jvp"), named, static)
    found, named = found[: len(results)], [*flatten(named)[0], *more]
    named += [named[i] for i in static.get("moving", ())]
    if [len(mapped + x) for x in named] != [x.ndim for x in leaves]:
        return None

    def known(axes: str, x: Any) -> str:
        pairs = zip(mapped + axes, x.shape, strict=True)
        return "".join(c if c != "." and size == sizes[c] != 1 else "." for c, size in pairs)

    return Axes(
        [known(axes, x) for axes, x in zip(named, leaves, strict=True)],
        [known(axes, x) for axes, x in zip(found, results, strict=True)],
        sizes,
    )


def operand_axes(operands: Operands, plan: Plan) -> Operands:
    """operands with the name of its axes in the place of each array."""
    mask, kv = operands.scores.mask, _laid_out(plan.kv_layout, "K", "S")
    if mask is not None:
        mask = jax.tree.unflatten(jax.tree.structure(mask), mask.array_axes())
    function = jax.tree.map(lambda x: "B" + "." * (x.ndim - 1), operands.scores.function)
    scores: Any = ("B", mask, "B", "BN", "B", "BNTS", function)
    quantization: Any = ("BNT", "BNT", "BKS", "BKS", "BKS.")
    if operands.pages is not None:  # pools, whose pages any row may have
        kv, quantization = "..K..", ("BNT", "BNT", "..K.", "..K.", "..K..")
    named: Any = (
        *(_laid_out(plan.layout, "N", "T"), kv, kv, Scores(*scores)),
        *("BN", "B.", Quantization(*quantization), "B."),
    )
    return jax.tree.map(
        lambda x, axes: None if x is None else axes,
        operands,
        Operands(*named),
        is_leaf=lambda x: x is None,
    )


def _others(name: str, operands: Operands, static: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of the leaves behind the operands, and of the results."""
    differentiable = Differentiable.of(operands).by_name()
    results, wrt = [operands.q, *["BNT"] * 3], [differentiable[n] for n in static.get("wrt", ())]
    match name:
        case "attention":
            return [], results
        case "tangent":
            return [*results, *wrt], results[:2]
        case _:
            return [*results, *results[:2]], wrt


def _laid_out(layout: Layout, heads: str, positions: str) -> str:
    return "".join(layout.axes("B", heads, positions, "."))
