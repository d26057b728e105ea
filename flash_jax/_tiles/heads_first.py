"""Keys and values brought into order by head, in one copy.

Few heads are copied one by one. XLA:CPU 0.12 transposes an array of which a loop reads few rows
into another order than the loop reads, and copies it once more. The copies are one operation where
XLA divides a program over devices: else it would take heads that lie on several apart, and send
each of them around.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from .jax_versions import as_here, like, module_mesh, on_mesh
from .xla import apart

_MOST_STACKED = 8  # heads copied one by one: the time to compile a stack grows with its length


@jax.custom_jvp
def heads_first(x: Array) -> Array:
    """x (B, S, K, H) as (B, K, S, H), in one copy."""
    return _heads_first_p.bind(x)


@heads_first.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The transpose of the copies head by head would be a sum over heads.
    return heads_first(*primals), jnp.swapaxes(*tangents, 1, 2)


def _copied(x: Array) -> Array:
    """x (..., S, K, H) as (..., K, S, H)."""
    heads = x.shape[-2]
    if heads not in range(2, _MOST_STACKED + 1):
        return apart(jnp.swapaxes(x, -3, -2))
    each = [lax.index_in_dim(x, n, -2, keepdims=False) for n in range(heads)]
    return apart(jnp.stack(each, axis=-3))


def _divided(x: Array) -> Array:
    context = as_here()

    def copied(x: Array) -> Array:
        with context():
            return _copied(x)

    def partition(mesh: Any, args: Any, _: Any) -> Any:
        (x,) = args
        *lead, positions, heads, size = x.sharding.spec
        turned = NamedSharding(mesh, PartitionSpec(*lead, heads, positions, size))
        return mesh, copied, turned, (x.sharding,)

    call = custom_partitioning(lambda x: jnp.swapaxes(x, -3, -2))
    call.def_partition(partition, sharding_rule="... s k h -> ... k s h")
    return call(x)


_heads_first_p = Primitive("flash_heads_first")
_compiled = jax.jit(lambda x: _heads_first_p.bind(x))
_alone, _together = (mlir.lower_fun(f, multiple_results=False) for f in (_copied, _divided))


@_heads_first_p.def_impl
def _(x: Array) -> Array:
    with jax.disable_jit(False):
        return _compiled(x)


@_heads_first_p.def_abstract_eval
def _(x: Any) -> Any:
    *lead, positions, heads, size = x.shape
    return like(x, jax.ShapeDtypeStruct((*lead, heads, positions, size), x.dtype))


def _lower(ctx: Any, x: Any) -> Any:
    mesh = module_mesh(ctx)
    return _alone(ctx, x) if mesh is None else _together(on_mesh(ctx, mesh), x)


def _batch(xs: tuple[Array], axes: tuple[int]) -> tuple[Array, int]:
    return _heads_first_p.bind(jnp.moveaxis(*xs, *axes, 0)), 0


mlir.register_lowering(_heads_first_p, _lower)
batching.primitive_batchers[_heads_first_p] = _batch
