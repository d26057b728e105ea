"""What a ring costs, on four devices: memory, what is sent, and the work of each device.

It prints nothing but "passed"; run by ``test_ring.py``.
"""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from garbage import collect_seldom
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from unoptimized import UNOPTIMIZED, run

from flash_jax import flash_attention, ring_attention
from flash_jax._passes.plan import Ring
from flash_jax._passes.ring_parts import Part

SEQUENCES = PartitionSpec(None, "x")


def mesh_of(devices):
    types = (AxisType.Auto,)
    return jax.make_mesh((devices,), ("x",), axis_types=types, devices=jax.devices()[:devices])


def compiled(devices, T, transform, **options):
    attend = functools.partial(ring_attention, axis_name="x", is_causal=True, **options)
    mesh = mesh_of(devices)
    call = jax.shard_map(attend, mesh=mesh, in_specs=SEQUENCES, out_specs=SEQUENCES)
    sharding = NamedSharding(mesh, SEQUENCES)
    x = jax.ShapeDtypeStruct((1, T, 2, 16), np.float32, sharding=sharding)
    return jax.jit(transform(call)).lower(x, x, x).compile(UNOPTIMIZED)


def gradient(call):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(call(*x))), (0, 1, 2))


def check_memory():
    """Of both passes it goes by the device's own share, and all is sent to the next device."""
    T = 2**18
    programs = {at: compiled(*at, gradient) for at in ((2, T), (4, T), (4, 2 * T))}
    temporary = {at: x.memory_analysis().temp_size_in_bytes for at, x in programs.items()}
    assert temporary[4, T] < 0.6 * temporary[2, T], temporary
    assert temporary[4, 2 * T] < 1.01 * temporary[2, T], temporary
    text = programs[4, T].as_text()
    assert not re.search(r"all-(gather|to-all|reduce)", text)
    pairs = {*re.findall(r"source_target_pairs=(\{\{.*?\}\})", text)}
    assert pairs == {"{{0,1},{1,2},{2,3},{3,0}}"}, pairs


def check_windows():
    """A window of one block needs the neighbours' keys, which the rounds between are not."""
    text = compiled(4, 4096, lambda f: f, local_window_size=(512, 0)).as_text()
    pairs = {*re.findall(r"source_target_pairs=(\{\{.*?\}\})", text)}
    assert pairs == {"{{0,1},{1,2},{2,3},{3,0}}", "{{0,2},{1,3},{2,0},{3,1}}"}, pairs


def check_work():
    """In zigzag order every device has as many causal pairs as any other, in every round."""
    n, T = 4, 6
    ring = Ring("x", n, 2, tuple(range(n)))

    def pairs(_):
        """Kept by a causal mask in each round."""
        device = lax.axis_index("x")
        counts = []
        for r in range(n):
            count = 0
            for a in range(2):
                for b in range(2):
                    part = Part(ring, T, T, device, (device - r) % n, np.int32(a), np.int32(b))
                    t, s = (x + np.arange(T // 2) for x in part.begins())
                    count += jnp.sum(s[None] <= t[:, None])
            counts.append(count)
        return jnp.stack(counts)[None]

    call = jax.shard_map(pairs, mesh=mesh_of(n), in_specs=SEQUENCES, out_specs=PartitionSpec("x"))
    counts = np.asarray(jax.jit(call)(jnp.zeros((1, n))))
    assert counts.shape == (n, n)
    assert (counts[:, 1:] == 2 * (T // 2) ** 2).all(), counts
    assert (counts == counts[:1]).all(), counts
    assert counts.sum() == (n * T) * (n * T + 1) // 2


def check_bias_of_pairs():
    """One of this device's queries and its own keys alone says nothing of the others."""
    bias = jnp.ones((256, 256), np.float32)
    with pytest.raises(ValueError, match="bias must have the keys of all devices, 1024, where it"):
        compiled(4, 1024, lambda f: f, bias=bias)


def check_heads_instead():
    """What the page on many devices gives for as many heads as devices is the undivided call."""
    page = Path(__file__).parents[2] / "docs" / "many_devices.md"
    code = page.read_text().split("def by_heads")[1].split("```")[0]
    names = {"jax": jax, "flash_attention": flash_attention}
    exec("def by_heads" + code, names)
    mesh = jax.make_mesh((4,), ("cores",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "cores")
    call = jax.shard_map(names["by_heads"], mesh=mesh, in_specs=spec, out_specs=spec)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 20, heads, 3)).astype(np.float32) for heads in (8, 4, 4))
    expected = flash_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(run(call, q, k, v), expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    assert jax.device_count() == 4
    collect_seldom()
    check_heads_instead()
    check_bias_of_pairs()
    check_work()
    check_windows()
    check_memory()
    print("passed")
