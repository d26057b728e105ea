"""Prints hashes of programs of paths with their derivatives: see ``test_programs.py``."""

import functools
import hashlib

import jax
import numpy as np
from jax.sharding import PartitionSpec
from paths import PATHS, derivatives

# One path of every kind that puts options together.
NAMES = "Mask", "lengths", "parameters", "dropout", "INT8", "kernels on int8"
SIZES = {"B": 2, "T": 37, "S": 41, "N": 4, "K": 2, "H": 5}


def main():
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for name in NAMES:
        path = PATHS[name]
        x = path.arrays(rng, **SIZES)
        results = jax.eval_shape(path.call, x)
        weights = jax.tree.map(lambda y: np.zeros(y.shape, y.dtype), results)
        text = jax.jit(functools.partial(derivatives, path)).lower(x, weights).as_text()
        print(name, hashlib.sha256(text.encode()).hexdigest())
    # What varies over several axes of a mesh.
    both = PartitionSpec("data", None, "model")
    call = lambda q, k: PATHS["lengths"].call(  # noqa: E731
        {"query": q, "key": k, "value": k, "query_seq_lengths": np.int32([3, 2])}
    )
    sharded = jax.shard_map(
        call, mesh=mesh, in_specs=(both, both), out_specs=(both, PartitionSpec("data", "model"))
    )
    x = PATHS["plain"].arrays(rng, **SIZES)
    text = jax.jit(sharded).lower(x["query"], x["key"]).as_text()
    print("two axes", hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
