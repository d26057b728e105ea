"""All that depends on JAX's version: what has no public name there, or has changed its name.

Tested with 0.10.2 and 0.12.0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jaxlib.version
from jax import Array
from jax.extend.core import Primitive
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

try:
    from jax._src import checkify
except ImportError:  # should JAX move it, attention works on without these reports
    checkify = None

try:
    from jax._src import config
except ImportError:
    config = None

try:
    from jax._src import xla_bridge
except ImportError:  # should JAX move it, tiles are those of a single device
    xla_bridge = None

# Whether XLA makes one kernel of a tile. 0.10 does, too, but a slow one.
ONE_KERNEL = jaxlib.version.__version_info__ >= (0, 11)


def cpu_devices() -> int:
    """How many CPU devices JAX has here; 1 where it has none, or none yet.

    JAX's devices must not be made by asking for them: their number may still be set.
    """
    if xla_bridge is None or not xla_bridge.backends_are_initialized():
        return 1
    try:
        return len(jax.local_devices(backend="cpu"))
    except RuntimeError:  # JAX_PLATFORMS names others only
        return 1


def varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes that x varies over in a ``shard_map``.

    So named since 0.10, the oldest that is supported; earlier releases have ``typeof(x).vma``. JAX
    documents neither.
    """
    return jax.typeof(x).manual_axis_type.varying


def without_varying_axes() -> AbstractContextManager[Any]:
    """A context in which types do not tell what varies over the mesh axes of a ``shard_map``.

    An operation in a jaxpr has types that agree; evaluated on others, these need not. There is no
    public name for what ``shard_map(check_vma=False)`` does (0.10 to 0.12).
    """
    # Should JAX move it, such a jaxpr fails in a ``shard_map``.
    context: Any = getattr(config, "_check_vma", lambda _: contextlib.nullcontext())
    return context(False)


def without_types(ctx: Any) -> Any:
    """The context of a lowering whose arrays vary over no mesh axes, as far as types tell."""
    of_none = (type(x.manual_axis_type)() for x in ctx.avals_in)
    pairs = zip(ctx.avals_in, of_none, strict=True)
    return ctx.replace(avals_in=[x.update(manual_axis_type=none) for x, none in pairs])


def like(aval: Any, x: Any) -> Any:
    """The type of an array of x's shape and dtype that varies over the mesh axes of ``aval``."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*(None for _ in x.shape)))
    return aval.update(shape=x.shape, dtype=x.dtype, weak_type=False, sharding=sharding)


def module_mesh(ctx: Any) -> AbstractMesh | None:
    """The mesh that a module is compiled for, in axes of prime sizes, while it is lowered.

    Axes of prime sizes are finer than those of most meshes, of which a program may have several.
    None where the module is for one device or exported, or where axes are manual.
    """
    module = ctx.module_context
    count = getattr(module.axis_context, "num_devices", 1)  # none in a ``shard_map``
    try:
        exported = (
            module.lowering_parameters.for_export or not jax.config.jax_use_shardy_partitioner
        )
    except AttributeError:  # should JAX move it, XLA gathers
        exported = True
    if count == 1 or exported:
        return None
    meshes = (aval.sharding.mesh for aval in ctx.avals_in)
    sizes = next((m.axis_sizes for m in meshes if not m.empty), (count,))
    if math.prod(sizes) != count:
        sizes = (count,)
    factors = [n for size in sizes for n in _prime_factors(size)]
    return AbstractMesh(tuple(factors), tuple(f"axis {i}" for i in range(len(factors))))


def on_mesh(ctx: Any, mesh: AbstractMesh) -> Any:
    """The context of a lowering with what ``custom_partitioning`` needs to name the axes of a mesh.

    Any devices will do. JAX would give the right ones to what is listed as in need of them, but
    then takes no program with two meshes.
    """
    module = ctx.module_context
    devices = tuple(jax.devices(module.platforms[0])[:1]) * mesh.size
    axis_context = dataclasses.replace(
        module.axis_context, device_assignment=devices, abstract_mesh=mesh
    )
    return ctx.replace(module_context=module.replace(axis_context=axis_context))


def functions_have_no_key() -> bool:
    """Whether functions that are divided by ``custom_partitioning`` are alike to JAX's cache.

    Their key in it is an address, which a setting leaves out: so that a program is found there by
    other processes, too.
    """
    return getattr(jax.config, "jax_remove_custom_partitioning_ptr_from_cache_key", False)


def as_here() -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which code of one device is traced as it would be here, without a mesh.

    XLA asks for that code from a thread in which JAX has its defaults (0.10), or while the mesh of
    ``jax.set_mesh`` is set (0.12).
    """
    x64, precision = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        settings = jax.enable_x64(x64), jax.default_matmul_precision(precision)
        with use_abstract_mesh(AbstractMesh((), ())), settings[0], settings[1]:
            yield

    return context


def _prime_factors(n: int) -> list[int]:
    for p in range(2, n):
        if n % p == 0:
            return [p, *_prime_factors(n // p)]
    return [n] if n > 1 else []


def report_nan(primitive: Primitive) -> None:
    """Has ``jax.experimental.checkify`` report NaN in the primitive's results.

    There is no public way to add a primitive to its checks (0.10 to 0.12).
    """
    if checkify is not None:
        rule = functools.partial(checkify.nan_error_check, primitive)
        checkify.error_checks[primitive] = rule
