"""What the primitives have in common: how they are evaluated, compiled and batched.

A ``vmap`` puts its axis in front of the batch, and a pass takes the two as one: loops keep their
trip counts, and tiles do not grow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from .._checks.shapes import no_taylor_series
from .._tiles.jax_versions import like, report_nan
from .calls import lead, mapped, merge, merged_shapes, split
from .forward import Results
from .partition import lowering

Entries = tuple[tuple[int, ...], ...]  # sizes of mapped axes and batch of some gradients

# Of each primitive: what it runs, and the shapes of its results.
run_of: dict[Primitive, Callable[..., list[Array]]] = {}
shapes_of: dict[Primitive, Callable[..., list[Any]]] = {}


def primitive(
    name: str, function: Callable[..., list[Array]], shapes: Callable[..., list[Any]]
) -> Primitive:
    """A primitive that runs ``function`` on leaves without mapped axes, and all its rules."""

    def run(*leaves: Array, calls: int, **static: Any) -> list[Array]:
        results = function(*merge(leaves, calls), **static)
        return split(results, static.get("entries", [lead(leaves, calls)] * len(results)))

    def of_run(*leaves: Any, calls: int, **static: Any) -> list[Any]:
        found = shapes(*merged_shapes(leaves, calls), **static)
        leads = static.get("entries", [lead(leaves, calls)] * len(found))
        return [
            jax.ShapeDtypeStruct((*sizes, *x.shape[1:]), x.dtype)
            for x, sizes in zip(found, leads, strict=True)
        ]

    return with_rules(name, run, of_run)


def with_rules(
    name: str, run: Callable[..., list[Array]], shapes: Callable[..., list[Any]]
) -> Primitive:
    """A primitive with rules to compile it, on any number of devices, and to batch it."""
    new = Primitive(f"flash_{name}")
    new.multiple_results = True

    @new.def_impl
    def _(*leaves: Array, **static: Any) -> list[Array]:
        # As JAX's own primitives, it is compiled within ``jax.disable_jit``, too.
        with jax.disable_jit(False):
            return _compiled(new, tuple(sorted(static.items())))(*leaves)

    @new.def_abstract_eval
    def _(*leaves: Any, **static: Any) -> list[Any]:
        return [like(leaves[0], x) for x in shapes(*leaves, **static)]

    mlir.register_lowering(new, lowering(name, run, shapes))
    batching.primitive_batchers[new] = functools.partial(_batch, new)
    jet.jet_rules[new] = no_taylor_series
    report_nan(new)
    run_of[new] = run
    shapes_of[new] = shapes
    return new


@functools.lru_cache(maxsize=256)
def _compiled(primitive: Primitive, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(lambda *leaves: primitive.bind(*leaves, **dict(static)))


def _batch(
    primitive: Primitive, leaves: Sequence[Array], axes: Sequence[Any], **static: Any
) -> tuple[list[Array], list[int]]:
    """Batching: one more mapped axis, the first axis of every leaf."""
    size = next(x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None)
    # Behind the operands come the results that belong to them, and what is linear. Queries and
    # results stay together, and tell how many instances there are.
    count, calls = static["tree"].num_leaves, static["calls"]
    own = {0, *range(count, count + len(Results._fields))} if len(leaves) > count else set()
    if "entries" in static:  # every call has its own gradients, of shared operands, too
        static["entries"] = tuple((size, *sizes) for sizes in static["entries"])
    # An operand and its tangent are of one shape.
    moving = static.get("moving", ())
    for pair in zip(moving, range(len(leaves) - len(moving), len(leaves)), strict=True):
        if any(i in own or axes[i] is not None for i in pair):
            own |= {*pair}
    leaves = [
        mapped(x, axis, size, calls, i in own)
        for i, (x, axis) in enumerate(zip(leaves, axes, strict=True))
    ]
    results = primitive.bind(*leaves, **static | {"calls": calls + 1})
    return results, [0] * len(results)
