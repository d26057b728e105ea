"""Attention over a mesh of two processes, beside that of one: see ``test_processes.py``.

python tests/helpers/two_processes.py PORT INDEX
"""

import functools
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from unoptimized import run

from flash_jax import (
    core_mesh,
    flash_attention_with_lse,
    ring_attention_with_lse,
    to_zigzag,
)
from flash_jax._tiles.jax_versions import cpu_devices

B, T, N, K, H, HV = 4, 24, 4, 2, 5, 3


def put(mesh, x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda at: x[at])


def derivatives(attend, qkv, weights):
    results, pull_back = jax.vjp(attend, *qkv)
    return results, pull_back(weights)


def check(found, expected):
    for y, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        for shard in y.addressable_shards:
            part = np.asarray(right)[shard.index]
            np.testing.assert_allclose(shard.data, part, rtol=0, atol=1e-5 * np.abs(right).max())


def main(port, index):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    mesh = core_mesh(2, axis_name="x")
    assert (mesh.size, jax.process_count(), cpu_devices()) == (4, 2, 2)
    rng = np.random.default_rng(20180508)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, HV), (B, T, N, HV), (B, N, T)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    options = {"is_causal": True, "dropout_rate": 0.3, "dropout_rng": jax.random.PRNGKey(3)}
    plain = functools.partial(flash_attention_with_lse, **options)
    expected = run(functools.partial(derivatives, plain), arrays[:3], tuple(arrays[3:]))

    batch = [put(mesh, x, PartitionSpec("x")) for x in arrays]
    found = run(functools.partial(derivatives, plain), batch[:3], tuple(batch[3:]))
    check(found, expected)

    out_specs = PartitionSpec(None, "x"), PartitionSpec(None, None, "x")
    ring = jax.shard_map(
        functools.partial(ring_attention_with_lse, axis_name="x", **options),
        mesh=mesh,
        in_specs=PartitionSpec(None, "x"),
        out_specs=out_specs,
    )
    axes = (1, 1, 1, 1, 2)
    ordered = [np.asarray(to_zigzag(x, 4, axis=i)) for x, i in zip(arrays, axes, strict=True)]
    specs = [out_specs[i - 1] for i in axes]
    parts = [put(mesh, x, spec) for x, spec in zip(ordered, specs, strict=True)]
    found = run(functools.partial(derivatives, ring), parts[:3], tuple(parts[3:]))
    in_order = lambda x, axis=1: np.asarray(to_zigzag(x, 4, axis=axis))  # noqa: E731
    (out, lse), gradients = expected
    check(found, ((in_order(out), in_order(lse, 2)), tuple(map(in_order, gradients))))
    print("passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
