"""A sequence over several machines: attention and its gradients by a ring of processes.

Start it on every machine, with the address of the first one, how many there are, and which this is:

    python several_processes.py 192.168.0.10:9876 2 0      # on the machine of that address
    python several_processes.py 192.168.0.10:9876 2 1      # on the other one

Every process has one CPU device per core, and every device its own part of the sequence. On one
machine two terminals do as well, with 127.0.0.1:9876 and, say, --cores 1.
"""

import argparse
import functools
import time

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flash_jax

parser = argparse.ArgumentParser()
parser.add_argument("address", help="of the first process: host:port")
parser.add_argument("count", type=int, help="of processes")
parser.add_argument("index", type=int, help="of this process: 0, 1, ...")
parser.add_argument("--cores", type=int, help="of each process (default: all of the machine)")
parser.add_argument("--length", type=int, default=8192, help="of the sequence")
args = parser.parse_args()

# First of all, before JAX makes its devices. CPUs exchange arrays by gloo, over TCP.
jax.distributed.initialize(args.address, args.count, args.index)
mesh = flash_jax.core_mesh(args.cores)
devices = mesh.size

# Each device makes its own part: nobody ever holds the whole sequence.
sequence, heads, head_dim = NamedSharding(mesh, P(None, "cores")), 8, 64
shape = (1, args.length, heads, head_dim)
order = np.asarray(flash_jax.to_zigzag(np.arange(args.length), devices, axis=0))


def part(where):
    """Some numbers by position, so that every number of devices gets the same."""
    positions = order[where[1]][:, None, None]
    wave = np.arange(1, 1 + heads * head_dim).reshape(heads, head_dim)
    return np.sin(positions * wave / 1024 + positions).astype(np.float32)[None]


x = jax.make_array_from_callback(shape, sequence, part)

attend = functools.partial(flash_jax.ring_attention, axis_name="cores", is_causal=True)
ring = jax.shard_map(attend, mesh=mesh, in_specs=P(None, "cores"), out_specs=P(None, "cores"))


@jax.jit
def step(x):
    """The norms of the output and of the gradients of a loss."""

    def loss(q, k, v):
        out = ring(q, k, v)
        return jnp.mean(out**2), out

    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(x, x, x)
    return [jnp.linalg.norm(y) for y in (out, *gradients)]


norms = jax.block_until_ready(step(x))
begin = time.perf_counter()
norms = jax.block_until_ready(step(x))
seconds = time.perf_counter() - begin
if args.index == 0:
    norms = " ".join(f"{float(norm):.5e}" for norm in norms)
    print(f"{devices} devices of {args.count} processes: {seconds:.3f} s", flush=True)
    print(f"norms of the output and of three gradients: {norms}", flush=True)
