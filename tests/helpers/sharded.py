"""Every path under ``shard_map``, beside the formula: run by ``mesh_table.py``.

What no formula here has, dropout and int8, is beside the unsharded call.
"""

import functools

import jax
import numpy as np
from formula import formula
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from paths import PATHS, derivatives, model
from unoptimized import UNOPTIMIZED, run

from flash_jax import flash_attention

SIZES = {
    "long": {"B": 4, "T": 37, "S": 41, "N": 8, "K": 4, "H": 5},  # a batch element per device
    "short": {"B": 12, "T": 7, "S": 5, "N": 8, "K": 4, "H": 5},  # several, which share a step
}


def mesh_of(data, model):
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, model), ("data", "model"), axis_types=types)


def meshes_of(length):
    """Meshes, which of their axes cut which axes of the arrays, and check_vma."""
    batch = mesh_of(4, 1), {"B": "data"}, True
    by_heads = mesh_of(1, 4), {"N": "model", "K": "model"}
    part = mesh_of(2, 2), {"B": "data"}, False  # the other axis of the mesh stays automatic
    if length == "long":
        return batch, (*by_heads, False)
    return batch, (*by_heads, True), part


OUT = "BTNH", "BNT"  # the axes of output and lse
# Elements that have a step of their own: one path of every kind. The others run where elements
# share a step.
LONG = "causal", "Mask", "INT8", "bias", "parameters", "dropout", "kernels"
RUN = "Mask", "dropout", "decode", "kernels on int8"
THOROUGH = "INT8", "segments"  # which run in the thorough tier


def kept_by_mask(x):
    """What the path Mask keeps, in NumPy."""
    ids, (t, s) = x["ids"], np.ogrid[: x["query"].shape[1], : x["key"].shape[1]]
    kept = (s <= t) | (s < x["lengths"][:, None, None])
    return (kept & (ids[..., None] == 0))[:, None]


FORMULAS = {
    "Mask": lambda x: formula(x["query"], x["key"], x["value"], mask=kept_by_mask(x)),
    "decode": model(formula, is_causal=True),
    "segments": model(formula),
}


def spec(axes, cuts):
    return PartitionSpec(*(cuts.get(axis) for axis in axes))


def alone(path, *calls):
    """The results of one program for each of the arrays and weights."""
    function = jax.jit(functools.partial(derivatives, path), compiler_options=UNOPTIMIZED)
    return [jax.tree.map(np.asarray, function(*call)) for call in calls]


def expected_of(name, x, weights):
    """The unsharded results: of the formula if there is one, of arrays that it wants concrete."""
    path = PATHS[name]
    if name not in FORMULAS:
        return alone(path, (x, weights))
    path = path._replace(call=lambda given: FORMULAS[name](x | given))
    return alone(path, ({name: x[name] for name in path.floats}, weights))


def part(y, axes, cuts, i, count):
    """What device i of count has of an array."""
    for n, axis in enumerate(axes):
        if axis in cuts:
            y = np.split(y, count, n)[i]
    return y


def parts(path, x, weights, cuts, count):
    """The unsharded function of each device's own part, put together."""
    calls = []
    for i in range(count):
        own = {name: part(y, path.all_axes[name], cuts, i, count) for name, y in x.items()}
        ws = (part(w, axes, cuts, i, count) for w, axes in zip(weights, OUT, strict=True))
        calls.append((own, tuple(ws)))

    def join(axes, ys):
        cut = [n for n, axis in enumerate(axes) if axis in cuts]
        return np.concatenate(ys, cut[0]) if cut else sum(ys)

    names = {name: path.all_axes[name] for name in path.floats}
    return jax.tree.map(lambda axes, *ys: join(axes, ys), (OUT, OUT, names), *alone(path, *calls))


def sharded(path, mesh, cuts, vma):
    """The path with its call under ``shard_map``."""
    specs = {name: spec(axes, cuts) for name, axes in path.all_axes.items()}
    call = jax.shard_map(
        path.call,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=tuple(spec(axes, cuts) for axes in OUT),
        check_vma=vma,
        axis_names=set(cuts.values()),
    )
    return path._replace(call=call)


def compare(found, expected):
    for y, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = max(1.0, np.max(np.abs(right), initial=0))
        np.testing.assert_allclose(y, right, rtol=0, atol=3e-5 * size)


def check_gradients_inside(x):
    """Keys that all devices share get the sum of what each device's queries give."""
    mesh, cuts = mesh_of(4, 1), {"B": "data"}
    call = jax.vmap(functools.partial(flash_attention, is_causal=True), in_axes=(0, None, None))
    qkv = x["query"], x["key"][0], x["value"][0]

    def inside(*qkv):
        return jax.grad(lambda *qkv: jnp.sum(call(*qkv) ** 2), argnums=(0, 1, 2))(*qkv)

    specs = spec("BTNH", cuts), spec("SKH", cuts), spec("SKH", cuts)
    sharded = jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=specs)
    for y, right in zip(run(sharded, *qkv), run(inside, *qkv), strict=True):
        np.testing.assert_allclose(y, right, rtol=0, atol=1e-4)


def checks(thorough):
    """Every path on a mesh, by name. What it computes is another test's: most are traced only."""
    others = [name for name in PATHS if name not in (*LONG, "plain", "lengths")]
    runs = THOROUGH if thorough else RUN
    for length, names in (("long", LONG), ("short", others)):
        meshes = meshes_of(length)
        for i, name in enumerate(names):
            if name in runs or not thorough:
                run = functools.partial(check, name, length, *meshes[i % len(meshes)], name in runs)
                yield f"{name}, {length}", run
    if thorough:
        for name in LONG:
            run = functools.partial(check, name, "short", *meshes_of("short")[0], False)
            yield f"{name}, short", run
        return
    x = PATHS["plain"].arrays(np.random.default_rng(20180508), **SIZES["long"])
    yield "gradients inside", functools.partial(check_gradients_inside, x)


def check(name, length, mesh, cuts, vma, runs):
    """Raises where a path differs from the call alone; if it does not run, where types do."""
    path, rng = PATHS[name], np.random.default_rng(20180508)
    x = path.arrays(rng, **SIZES[length])
    sizes = SIZES[length] | {"T": x["query"].shape[1]}
    shapes = (tuple(sizes[axis] for axis in axes) for axes in OUT)
    weights = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    ours = sharded(path, mesh, cuts, vma)
    if not runs:
        jax.eval_shape(functools.partial(derivatives, ours), x, weights)
    elif path.per_shard:  # dropout goes by the indices on each device
        count = mesh.shape[next(iter(cuts.values()))]
        compare(*alone(ours, (x, weights)), parts(path, x, weights, cuts, count))
    else:
        compare(*alone(ours, (x, weights)), *expected_of(name, x, weights))
