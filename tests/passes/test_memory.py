"""Temporary memory, as XLA plans it: deterministic, so asserted to the byte's order.

XLA plans it before LLVM gets to the program, which here is not optimized.
"""

import sys

import jax
import pytest
from jax import numpy as jnp
from options import SHAPES, spec, split
from processes import run_script
from unoptimized import UNOPTIMIZED

from flash_jax import FlashAttentionConfig, flash_attention, flash_mha


def compiled(T, *, N=2, H=16, causal, dtype=jnp.float32, blocks=None):
    if blocks is None:
        config = FlashAttentionConfig.auto(H, T, T, causal=causal)
    else:
        config = FlashAttentionConfig(*blocks, H, causal)
    x = jax.ShapeDtypeStruct((N, T, H), dtype)
    return jax.jit(flash_mha, static_argnums=0).lower(config, x, x, x).compile(UNOPTIMIZED)


def temporary_bytes(T, **options):
    return compiled(T, **options).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("dtype", "causal"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_memory_is_linear(dtype, causal):
    T = 16 * 1024
    small = temporary_bytes(T, causal=causal, dtype=dtype)
    large = temporary_bytes(4 * T, causal=causal, dtype=dtype)
    assert large <= 4.2 * small
    assert large < 64 * 2**20 < 4 * (4 * T) ** 2  # beside the scores of one head


def test_memory_is_linear_with_small_tiles_too():
    """The schedule has (T / 64)^2 tiles: it must not be held at once."""
    small = temporary_bytes(2**15, N=1, causal=True, blocks=(64, 64))
    large = temporary_bytes(2**17, N=1, causal=True, blocks=(64, 64))
    assert large <= 4.2 * small


def test_131072_positions_fit_in_128_mib():
    assert temporary_bytes(131072, N=1, H=64, causal=True) < 128 * 2**20


@pytest.mark.usefixtures("compiled_here")
def test_the_program_does_not_grow_with_the_length():
    sizes = [len(compiled(T, causal=True, blocks=(64, 64)).as_text()) for T in (2**10, 2**16)]
    assert sizes[1] < 1.05 * sizes[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of resident memory")
@pytest.mark.parametrize(
    ("T", "S", "derivative"),
    [(1021, 131072, "False"), (1021, 131072, "True"), (4099, 4093, "False")],
)
def test_resident_memory_is_what_xla_plans_and_64_mib_of_scratch(T, S, derivative):
    """XLA's library allocates the scratch of its kernels by itself."""
    printed = run_script("resident.py", str(T), str(S), "64", "float32", derivative)
    resident, planned = map(int, printed.split())
    assert resident < planned + 64 * 2**20


# Model level

N, H = 2, 16
SMALL, LARGE = 2**14, 2**16


def model_bytes(T, options, transform=lambda f: f, *, S=None, heads=N, kv_heads=N, H=H):
    """Temporary bytes of flash_attention, with arrays as arguments of the jitted function."""
    S = T if S is None else S
    qkv = spec(1, T, heads, H), spec(1, S, kv_heads, H), spec(1, S, kv_heads, H)
    x, arrays, static = split(dict(zip(("query", "key", "value"), qkv, strict=True)) | options)

    def run(x, arrays):
        return transform(lambda x: flash_attention(**x, **arrays, **dict(static)))(x)

    return jax.jit(run).lower(x, arrays).compile(UNOPTIMIZED).memory_analysis().temp_size_in_bytes


def gradient(call):
    return jax.grad(lambda x: jnp.sum(call(x)))


def hvp(call):
    return lambda x: jax.jvp(gradient(call), (x,), (x,))[1]


# A gradient runs the pass forward, too: below are the options that have none there.
@pytest.mark.parametrize("options", ["none", "mask and bias of queries"])
def test_memory_is_linear_with_every_option(options):
    small, large = (model_bytes(T, SHAPES[options](T)) for T in (SMALL, LARGE))
    assert large <= 4.2 * small
    assert large < LARGE**2 / 16  # far below one byte per pair


@pytest.mark.parametrize(
    ("options", "transform"),
    [
        ("none", gradient),
        ("masks", gradient),
        ("mask and bias of keys", gradient),
        ("parameters and dropout", hvp),
    ],
)
def test_memory_of_derivatives_is_linear(options, transform):
    small, large = (model_bytes(T, SHAPES[options](T), transform) for T in (4096, 16384))
    assert large <= 2.2**2 * small
    assert large < 16384**2  # one byte per pair


def test_a_full_bias_costs_its_own_size_once():
    T = 4096
    without = model_bytes(T, {"bias": spec(1, 1, 1, T)}, gradient)
    assert model_bytes(T, {"bias": spec(1, 1, T, T)}, gradient) <= 1.05 * 4 * T**2 + without


def test_the_gradient_of_65536_positions_fits_in_512_mib():
    heads = {"heads": 1, "kv_heads": 1, "H": 64}
    assert model_bytes(65536, {"is_causal": True}, gradient, **heads) < 512 * 2**20


def test_a_full_bias_and_a_full_mask_are_not_copied():
    """The arguments are quadratic themselves; nothing else is, not even a bool per pair."""

    def full(T):
        return {"bias": spec(1, N, T, T), "mask": spec(1, 1, T, T, dtype=bool)}

    small, large = (model_bytes(T, full(T) | {"block_sizes": (128, 128)}) for T in (2**12, 2**14))
    assert large <= 4.2 * small
    assert large < (2**14) ** 2 / 4


def test_grouped_keys_and_values_are_not_repeated():
    T, S, heads = 64, 2**18, 8
    repeated = S * heads * H * 4
    assert model_bytes(T, {}, S=S, heads=heads, kv_heads=1) < repeated / 2


def test_keys_and_values_are_brought_into_order_by_head_in_one_copy():
    T, S = 2, 2**16
    copies = 2 * S * N * H * 4
    assert copies < model_bytes(T, {"block_sizes": (1, 64)}, S=S) < 1.2 * copies


def test_one_key_and_value_for_the_whole_batch_is_not_repeated():
    """vmap over queries only: the batch reads the same keys where they are."""
    B, T, S = 8, 64, 2**18
    call = jax.vmap(flash_attention, in_axes=(0, None, None))
    qkv = spec(B, T, 1, H), spec(S, 1, H), spec(S, 1, H)
    memory = jax.jit(call).lower(*qkv).compile(UNOPTIMIZED).memory_analysis()
    assert memory.temp_size_in_bytes < B * S * H * 4 / 2
