"""Calls that ``jit`` divides over a mesh, beside the formula: run by ``mesh_table.py``.

A case is a path, how a mesh divides its axes, and what is done with it. Its program is compiled
once, is looked at for collectives, and runs on 4 devices. What no formula here has, dropout and
INT8, is beside the undivided call.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from partitioned_paths import FORMULAS, PATHS, B, H, N, S, T
from paths import Path, derivatives
from unoptimized import UNOPTIMIZED, run

OUT = "BTNH", "BNT"  # the axes of output and lse
COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
# What a device keeps of a call that is divided so: nothing must be gathered. B by x is {"B": "x"}.
APART = {
    "batch": {"B": "x"},
    "heads": {"N": "x", "K": "x"},
    "queries": {"T": "x"},
    "keys": {"S": "x"},
    "batch and heads": {"B": "d", "N": "m", "K": "m"},
    "queries and keys": {"T": "d", "S": "m"},
}


def mesh_of(kind: AxisType, cuts: Mapping[str, Any]) -> jax.sharding.Mesh:
    """4 devices in the axes that ``cuts`` names: x alone, or d and m."""
    if "x" in cuts.values():
        return jax.make_mesh((4,), ("x",), axis_types=(kind,))
    return jax.make_mesh((2, 2), ("d", "m"), axis_types=(kind,) * 2)


LONG = {"T": 128, "S": 128}  # a device's part is large enough for kernels


class Case(NamedTuple):
    """What is divided: ``of`` says what is done with a path, and cuts the axes by those of a mesh.

    Attributes:
        mapped: what cuts an axis in front of the others that ``vmap`` maps; False: there is none.
        gathers: whether something may be gathered.
        reduced: how many all-reduces there are; None: any number.
    """

    path: str
    cuts: Mapping[str, str]
    of: str = "derivatives"
    kind: AxisType = AxisType.Auto
    K: int = 4
    mapped: str | bool | None = False
    gathers: bool = False
    reduced: int | None = None
    sizes: Mapping[str, int] = types.MappingProxyType({})


EXPLICIT = {"kind": AxisType.Explicit}
BOTH, ACROSS = APART["batch and heads"], APART["queries and keys"]
# Every path, every way to divide a call and everything that is done with one, at least once.
CASES = (
    Case("everything", ACROSS, **EXPLICIT),
    Case("whole rows", {"N": "x"}, "forward", K=2, reduced=0),
    Case("whole rows", {"T": "x", "S": "x"}, "forward", gathers=True),
    Case("whole rows", ACROSS, "hvp"),
    Case("dropout", ACROSS, "forward"),
    Case("INT8", BOTH),
    Case("blocks", ACROSS, "forward"),
    Case("decode", APART["keys"], "forward", reduced=3, **EXPLICIT),
    Case("plain", {"T": "m"}, "forward", mapped="d"),
    Case("whole rows", BOTH, "scan"),
    Case("score_mod", ACROSS, **EXPLICIT),
    Case("predicate", ACROSS, "forward", sizes=LONG),
)
# The rest of their products.
THOROUGH = (
    *(Case("everything", cuts) for cuts in (APART["batch"], APART["heads"], ACROSS)),
    Case("everything", {"T": "x", "S": "x"}, gathers=True),
    Case("plain", {"N": "x"}, "forward", K=2, reduced=0),
    Case("plain", {"T": "x", "S": "x"}, "forward", gathers=True),
    Case("plain", ACROSS, "hvp"),
    Case("plain", BOTH, "scan"),
    *(Case("plain", APART[name]) for name in ("queries", "keys")),
    Case("plain", {"N": "x"}, K=1),
    Case("plain", {"N": "x"}, K=2, gathers=True),  # what two devices have of a gradient
    Case("plain", {"N": "x"}, "forward", K=2, reduced=0, **EXPLICIT),
    Case("plain", BOTH, "forward", reduced=0),
    Case("plain", ACROSS, "forward", reduced=3),
    Case("plain", APART["keys"], "forward", reduced=3),
    Case("plain", BOTH, "hvp"),
    Case("dropout", BOTH, "forward"),
    Case("INT8", APART["keys"], "forward"),
    Case("INT8", BOTH, "forward", **EXPLICIT),
    Case("blocks", BOTH, "forward"),
    Case("blocks", ACROSS),
    Case("decode", APART["keys"]),
    Case("plain", BOTH, mapped=None),
    Case("plain", BOTH, "forward", mapped=None, **EXPLICIT),
    Case("plain", {"T": "m"}, mapped="d", **EXPLICIT),
    Case("plain", BOTH, "scan", **EXPLICIT),
    Case("score_mod", BOTH),
    Case("score_mod", ACROSS, "hvp"),
    Case("predicate", BOTH, "forward", sizes=LONG),
)


def checks(thorough):
    for case in THOROUGH if thorough else CASES:
        yield str(case), functools.partial(check, case)


def spec(axes, cuts):
    """The sharding of an array: what cuts two of its axes cuts the first."""
    names = [cuts.get(axis) for axis in axes]
    return PartitionSpec(*(x if x not in names[:i] else None for i, x in enumerate(names)))


def function_of(case: Case, path: Path) -> Callable[..., Any]:
    """What is compiled: a function of the arrays of the path, and of weights of its results."""
    if case.of == "derivatives":
        function = functools.partial(derivatives, path)
    else:
        function = functools.partial(globals()[f"_{case.of}"], path)
    return function if case.mapped is False else jax.vmap(function)


def _forward(path, x, _):
    return path.call(x)


def gradient(path, x, weights):
    floats = {name: x[name] for name in path.floats}
    return jax.grad(lambda floats: jnp.sum(path.call(x | floats)[0] * weights[0]))(floats)


def _hvp(path, x, weights):
    floats = {name: x[name] for name in path.floats}
    of_floats = lambda floats: gradient(path, x | floats, weights)  # noqa: E731
    return jax.jvp(of_floats, (floats,), (jax.tree.map(jnp.cos, floats),))


def _scan(path, x, weights):
    """Gradients of two layers of a scan, each computed again."""

    def loss(x):
        layer = jax.checkpoint(lambda q, _: (path.call(x | {"query": q})[0], None))
        return jnp.sum(jax.lax.scan(layer, x["query"], None, length=2)[0] * weights[0])

    return jax.grad(loss)(x)


@functools.cache
def inputs(name: str, K: int, mapped: bool, sizes: tuple) -> tuple[dict, tuple, dict]:
    """Arrays of a path, weights of its results, and their axes."""
    path, rng = PATHS[name], np.random.default_rng(20180508)
    sizes = {"B": B, "T": 1 if path.one_query else T, "S": S, "N": N, "K": K, "H": H, **dict(sizes)}
    lead = "4" if mapped else ""
    axes = {name: lead + x for name, x in path.all_axes.items()}
    calls = [path.arrays(rng, **sizes) for _ in range(4 if mapped else 1)]
    x = jax.tree.map(lambda *xs: np.stack(xs) if mapped else xs[0], *calls)
    shapes = ([{"4": 4, **sizes}[c] for c in lead + of] for of in OUT)
    weights = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, weights, axes


@functools.cache
def expected_of(name: str, of: str, K: int, mapped: bool, sizes: tuple) -> Any:
    case = Case(name, {}, of, K=K, mapped=None if mapped else False)
    x, weights, _ = inputs(name, K, mapped, sizes)
    path = PATHS[name]
    given = x if name not in FORMULAS else {name: x[name] for name in path.floats}
    rest = {name: y for name, y in x.items() if name not in given}  # concrete, as a formula asks
    call = FORMULAS.get(name, path.call)
    function = function_of(case, path._replace(call=lambda x: call(rest | x)))
    return jax.tree.map(np.asarray, run(function, given, weights))


def check(case: Case) -> None:
    """Raises where a divided call gives other numbers, or communicates more than it should."""
    mapped, sizes = case.mapped is not False, tuple(case.sizes.items())
    x, weights, axes = inputs(case.path, case.K, mapped, sizes)
    cuts = {**case.cuts, "4": case.mapped or None}
    mesh = mesh_of(case.kind, cuts)
    put = lambda x, axes: jax.device_put(x, NamedSharding(mesh, spec(axes, cuts)))  # noqa: E731
    x = {name: put(y, axes[name]) for name, y in x.items()}
    lead = "4" if mapped else ""
    weights = tuple(put(w, lead + axes) for w, axes in zip(weights, OUT, strict=True))
    function = function_of(case, PATHS[case.path])
    compiled = jax.jit(function).lower(x, weights).compile(compiler_options=UNOPTIMIZED)
    found = compiled(x, weights)
    compare(found, expected_of(case.path, case.of, case.K, mapped, sizes))
    counts = collectives(compiled)
    assert case.gathers or not counts["all-gather"], counts
    assert case.reduced in (None, counts["all-reduce"]), counts
    if case.of in ("derivatives", "forward"):  # results are divided as the arrays are
        results = found[0] if case.of == "derivatives" else found
        for y, axes in zip(results, OUT, strict=True):
            expected = NamedSharding(mesh, spec(lead + axes, cuts))
            assert y.sharding.is_equivalent_to(expected, y.ndim), y.sharding


def collectives(compiled) -> dict[str, int]:
    """How many of each kind a compiled program has."""
    text = compiled.as_text()
    return {x: len(re.findall(rf"= [^=]*\b{x}(?:-start)?\(", text)) for x in COLLECTIVES}


def compare(found, expected, bound=2e-5):
    for y, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        y = np.asarray(y)
        np.testing.assert_array_equal(np.isfinite(y), np.isfinite(right))
        y, right = (np.where(np.isfinite(x), x, 0) for x in (y, right))
        size = max(1.0, np.max(np.abs(right), initial=0))
        np.testing.assert_allclose(y, right, rtol=0, atol=bound * size)
