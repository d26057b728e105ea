"""The memory of a call that ``jit`` divides over a mesh: run by ``mesh_table.py``."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from partitioned import APART, OUT, gradient, mesh_of, spec
from paths import Path, model
from unoptimized import UNOPTIMIZED


def checks(thorough):
    if not thorough:
        yield "memory", check_memory


def check_memory():
    """A device's temporaries are its part of those of the whole call, and tiles of scores."""
    sizes = {"B": 4, "T": 2**15, "S": 2**15, "N": 4, "K": 4, "H": 64}
    whole = temporary_bytes(sizes, {})
    assert temporary_bytes(sizes, APART["batch"]) <= whole / 4 + 20 * 2**20


def temporary_bytes(sizes, cuts):
    """Of gradients of a causal call on each device, as XLA plans them."""
    path, mesh = Path(model(is_causal=True)), mesh_of(AxisType.Auto, {"B": "x"})

    def shape(axes):
        sharding = NamedSharding(mesh, spec(axes, cuts)) if cuts else None
        shape = tuple(sizes[c] for c in axes)
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)

    arrays = {name: shape(axes) for name, axes in path.all_axes.items()}
    lowered = jax.jit(functools.partial(gradient, path)).lower(arrays, tuple(map(shape, OUT)))
    return lowered.compile(UNOPTIMIZED).memory_analysis().temp_size_in_bytes
