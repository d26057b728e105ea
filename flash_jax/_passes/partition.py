"""How the work of a call is divided over the devices of a mesh.

Where ``jit`` compiles for several devices, XLA divides the arrays of a program over a mesh. It
cannot divide a loop over tiles: it would gather all that the loop reads, and every device would do
all the work. So a primitive is one operation to it (``custom_partitioning``), with a rule that says
which axes of the arrays go together, and a function of what one device has.

A device has some instances, heads, queries and keys, and knows where they begin: ``Origin``. Then
masks, ALiBi and dropout are those of the whole call. What devices have of the queries stands alone.
What they have of the keys is joined,

    m = max_i m_i,    l = sum_i l_i exp(m_i - m),    out = sum_i out_i l_i exp(m_i - m) / l,

and tangents and gradients, which recompute probabilities from m and l of all keys, are summed.

Shardy's rules: https://docs.jax.dev/en/latest/jax.experimental.custom_partitioning.html
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.interpreters import mlir
from jax.sharding import NamedSharding

from .._tiles.jax_versions import (
    as_here,
    functions_have_no_key,
    module_mesh,
    on_mesh,
    without_types,
    without_varying_axes,
)
from .axes import Axes, axes_of
from .device import on_a_device
from .division import divide
from .operands import has_score_function


def lowering(
    name: str, run: Callable[..., list[Array]], shapes: Callable[..., list[Any]]
) -> Callable[..., Any]:
    """The rule that compiles a primitive: ``run``, divided where there are several devices.

    Not in an exported program, nor in a ``shard_map``, which has divided the arrays already.

    Args:
        name: of the primitive, without its prefix.
        run: what it does on one device.
        shapes: the shapes and dtypes of its results.
    """

    def divided(*leaves: Array, **static: Any) -> list[Array]:
        return _divided(name, run, shapes(*leaves, **static), leaves, static)

    alone, together = (mlir.lower_fun(f, multiple_results=True) for f in (run, divided))

    def lower(ctx: Any, *values: Any, **static: Any) -> Any:
        if has_score_function(static["tree"]):
            with without_varying_axes():
                return lower_any(without_types(ctx), *values, **static)
        return lower_any(ctx, *values, **static)

    def lower_any(ctx: Any, *values: Any, **static: Any) -> Any:
        mesh = module_mesh(ctx)
        if mesh is None:
            return alone(ctx, *values, **static)
        return together(on_mesh(ctx, mesh), *values, **static)

    return lower


def _divided(
    name: str,
    run: Callable[..., list[Array]],
    results: Sequence[Any],
    leaves: Sequence[Array],
    static: dict[str, Any],
) -> list[Array]:
    axes = axes_of(name, leaves, results, static)
    if axes is None:
        return run(*leaves, **static)
    context = as_here()
    # Behind the leaves, what has no axes.
    more = [_fingerprint(run, leaves, static)] if functions_have_no_key() else []

    def partition(mesh: Any, args: Any, results: Any) -> Any:
        division = divide(mesh, axes, args, results)
        sharding = lambda names: NamedSharding(mesh, division.spec(names))  # noqa: E731
        of_leaves = tuple(map(sharding, [*axes.leaves, *("" for _ in more)]))

        def on_device(*own: Array) -> list[Array]:
            with context():
                return on_a_device(name, run, own[: len(leaves)], static, axes, division)

        return mesh, on_device, [*map(sharding, axes.results)], of_leaves

    # It tells the shapes only, for constants that are arrays are refused.
    call = custom_partitioning(lambda *_: [jnp.zeros(x.shape, x.dtype) for x in results])
    rule = _rule(axes._replace(leaves=[*axes.leaves, *("" for _ in more)]))
    call.def_partition(partition=partition, sharding_rule=lambda *_: rule)
    return call(*leaves, *more)


def _fingerprint(
    run: Callable[..., list[Array]], leaves: Sequence[Array], static: dict[str, Any]
) -> Array:
    """A number that differs between programs which differ in more than their shapes."""
    whole = jax.make_jaxpr(functools.partial(run, **static))(*leaves)
    text = re.sub(" at 0x[0-9a-f]+", "", f"{whole.jaxpr} {static['plan']}").encode()
    for x in whole.consts:
        text += np.asarray(x).tobytes()
    return jnp.array(zlib.crc32(text), np.uint32)


def _rule(axes: Axes) -> SdyShardingRule:
    """Which axes of the arrays may be divided, and which of them go together."""
    N, K = axes.sizes["N"], axes.sizes["K"]
    factors: dict[str, Any] = {c: c for c in axes.sizes}
    of_groups: Any = {}
    if N == K:
        factors["K"] = "N"
    elif K > 1:
        factors["N"], of_groups = CompoundFactor("K", "G"), {"G": N // K}
    undivided = []

    def factor(c: str) -> Any:
        if c != ".":
            return factors[c]
        undivided.append(f"alone{len(undivided)}")
        return undivided[-1]

    # Shardy wants those that must be whole in the order in which they appear.
    leaves, results = (
        tuple(ArrayMapping(*map(factor, names)) for names in arrays)
        for arrays in (axes.leaves, axes.results)
    )
    return SdyShardingRule(leaves, results, need_replication_factors=tuple(undivided), **of_groups)
