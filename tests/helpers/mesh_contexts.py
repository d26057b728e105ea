"""The ways to tell JAX of a mesh, and programs that a mesh is no part of: run by ``mesh_table.py``.

Each check raises where attention is not that of one device.
"""

import functools
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
from jax import export, lax
from jax import numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from partitioned import collectives, compare

from flash_jax import flash_attention

# B, queries and heads that meshes of 1, 2 and 3 divide, and lengths that they do not.
SHAPES = (6, 12, 6, 5), (6, 17, 6, 5)


def arrays(dtype=np.float32):
    rng = np.random.default_rng(20180508)
    q, k, v = (rng.standard_normal(SHAPES[i]).astype(dtype) for i in (0, 1, 1))
    return q, k, v


ATTEND = functools.partial(flash_attention, is_causal=True, query_offset=5)  # a single tile
IN_TILES = functools.partial(ATTEND, block_sizes=(5, 7))


def mesh_of(count, name="x", kind=AxisType.Auto):
    return jax.make_mesh((count,), (name,), axis_types=(kind,), devices=jax.devices()[:count])


def put(mesh, spec, xs):
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x in xs)


def meshes_of_any_number_of_devices(attend, expected):
    for count, kind in ((1, AxisType.Explicit), (2, AxisType.Explicit), (3, AxisType.Auto)):
        mesh = mesh_of(count, kind=kind)
        found = jax.jit(attend)(*put(mesh, PartitionSpec("x"), arrays()))
        compare(found, expected)
        assert len(found.sharding.device_set) == count
    q, k, v = arrays()
    mesh = mesh_of(3)
    q, (k, v) = put(mesh, PartitionSpec(None, "x"), [q])[0], put(mesh, PartitionSpec(), (k, v))
    compare(jax.jit(attend)(q, k, v), expected)


def a_mesh_that_is_set(attend, expected):
    """With something that is sharded in it, or nothing at all; and on one device."""

    def inside(*xs):
        return attend(*(lax.with_sharding_constraint(x, PartitionSpec("x")) for x in xs))

    mesh = mesh_of(2)
    with jax.set_mesh(mesh):
        compare(jax.jit(inside)(*arrays()), expected)
        compare(jax.jit(attend)(*arrays()), expected)
    with warnings.catch_warnings():  # JAX 0.12 would rather have ``jax.set_mesh``
        warnings.simplefilter("ignore", DeprecationWarning)
        with mesh:
            compare(jax.jit(inside)(*arrays()), expected)
    for count in (1, 2):
        with jax.set_mesh(mesh_of(count, kind=AxisType.Explicit)):
            found, pull_back = jax.vjp(attend, *map(jnp.asarray, arrays()))
            compare(found, expected)
            gradients = pull_back(jnp.ones_like(found))
            assert [x.shape for x in gradients] == [SHAPES[i] for i in (0, 1, 1)]


def shardings_of_arguments(attend, expected):
    of_batch = NamedSharding(mesh_of(2), PartitionSpec("x"))
    found = jax.jit(attend, in_shardings=of_batch, out_shardings=of_batch)
    compiled = found.lower(*arrays()).compile()
    compare(compiled(*arrays()), expected)
    assert not any(collectives(compiled).values())


def outside_of_jit(attend, expected):
    found = attend(*put(mesh_of(2), PartitionSpec("x"), arrays()))
    compare(found, expected)
    assert found.sharding.spec == PartitionSpec("x")


def no_mesh_at_all(attend, expected):
    """Though there are several devices."""
    text = jax.jit(attend).lower(*arrays()).as_text()
    assert "CustomSPMDPartitioning" not in text
    compare(jax.jit(attend)(*arrays()), expected)


def two_meshes_in_one_program(attend, expected):
    other = NamedSharding(mesh_of(2, "y"), PartitionSpec(None, None, "y"))

    def both(q, k, v):
        first = attend(q, k, v)
        q, k, v = (lax.with_sharding_constraint(x, other) for x in (q, k, v))
        return first, attend(q, k, v)

    compare(jax.jit(both)(*put(mesh_of(2), PartitionSpec("x"), arrays())), (expected, expected))


def float64(attend, _expected):
    with jax.enable_x64(True):
        expected = np.asarray(attend(*arrays(np.float64)))
        mesh, (q, k, v) = mesh_of(2), arrays(np.float64)
        kv = put(mesh, PartitionSpec(None, None, "x"), (k, v))
        found = jax.jit(attend)(*put(mesh, PartitionSpec(None, None, "x"), [q]), *kv)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def an_exported_program(attend, expected):
    """It has no functions to divide it by: XLA gathers, and the result is right."""
    of_batch = NamedSharding(mesh_of(2), PartitionSpec("x"))
    exported = export.export(jax.jit(attend, in_shardings=of_batch))(*arrays())
    call = export.deserialize(exported.serialize()).call
    compare(call(*put(mesh_of(2), PartitionSpec("x"), arrays())), expected)


def programs_in_the_compilation_cache(_attend, _expected):
    """That differ in a window alone are told apart, though JAX leaves their functions out."""
    mesh, folder = mesh_of(2), tempfile.TemporaryDirectory()
    settings = {
        "jax_remove_custom_partitioning_ptr_from_cache_key": True,
        "jax_compilation_cache_dir": folder.name,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    xs = put(mesh, PartitionSpec("x"), arrays())
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for size in (3, 1):
            call = jax.jit(lambda *qkv, size=size: flash_attention(*qkv, local_window_size=size))
            alone = flash_attention(*arrays(), local_window_size=size)
            compare(call(*xs), np.asarray(alone))
        assert any(Path(folder.name).iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        folder.cleanup()


CHECKS = (
    meshes_of_any_number_of_devices,
    a_mesh_that_is_set,
    shardings_of_arguments,
    no_mesh_at_all,
    two_meshes_in_one_program,
    an_exported_program,
    programs_in_the_compilation_cache,
)

# A cache on a mesh is called outside of jit by default, and float64 is tested on one device.
THOROUGH = outside_of_jit, float64


def checks(thorough):
    """The checks by name; each raises where it fails. The thorough ones are in tiles."""
    attend = IN_TILES if thorough else ATTEND
    expected = np.asarray(attend(*arrays()))
    for check in (*CHECKS, *THOROUGH) if thorough else CHECKS:
        yield check.__name__, functools.partial(check, attend, expected)
