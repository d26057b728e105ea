"""Explicit axes of a mesh, by which the type of an array tells how it is sharded.

They are the default of ``jax.make_mesh``. A call is computed on Auto axes, where the primitives are
divided, and its results are sharded as the queries are.

https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, auto_axes, get_abstract_mesh

R = TypeVar("R")


def on_auto_axes(
    attend: Callable[..., R], axes: str, results: Any, query: Array, *arrays: Any
) -> R:
    """``attend(query, *arrays)``, with results that are sharded as query is.

    Args:
        attend: a function of arrays, and of trees of them.
        axes: those of query, a letter each.
        results: a tree of strings, the axes of the results; "." for one that is not sharded.
    """
    by = {axis: names for axis, names in zip(axes, _spec(query), strict=False)}
    specs = jax.tree.map(lambda names: PartitionSpec(*map(by.get, names)), results)
    return _with_results(attend, specs, query, *arrays)


def as_it_was(change: Callable[..., R], tree: R, *arrays: Any) -> R:
    """``change(tree, *arrays)``, a tree of as many arrays, each sharded as that of ``tree`` is."""
    return _with_results(change, jax.tree.map(_spec, tree), tree, *arrays)


def _with_results(function: Callable[..., R], specs: Any, *arrays: Any) -> R:
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return function(*arrays)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    on_auto: Any = auto_axes(function, axes=mesh.explicit_axes, out_sharding=shardings)
    return on_auto(*arrays)


def _spec(x: Array) -> PartitionSpec:
    sharding = jax.typeof(x).sharding
    return PartitionSpec() if sharding.mesh.empty else sharding.spec


def model_axes(query: Array) -> tuple[str, tuple[str, str]]:
    """The axes of query, with or without B, and those of the output and of lse."""
    return ("BTN.", ("BTN.", "BNT")) if query.ndim == 4 else ("TN.", ("TN.", "NT"))


def _explicit_mesh(arrays: Any) -> AbstractMesh | None:
    """The mesh that is set, or else that of the arrays; None: none of its axes are explicit."""
    of_arrays = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays))
    return next((mesh for mesh in (get_abstract_mesh(), *of_arrays) if mesh.explicit_axes), None)
