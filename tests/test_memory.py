"""Temporary memory, as XLA plans it: deterministic, so asserted to the byte's order."""

import jax
import pytest
from jax import numpy as jnp

from flash_jax import FlashAttentionConfig, flash_mha


def compiled(T, *, N=2, H=16, causal, dtype=jnp.float32, blocks=None):
    if blocks is None:
        config = FlashAttentionConfig.auto(H, T, T, causal=causal)
    else:
        config = FlashAttentionConfig(*blocks, H, causal)
    x = jax.ShapeDtypeStruct((N, T, H), dtype)
    return jax.jit(flash_mha, static_argnums=0).lower(config, x, x, x).compile()


def temporary_bytes(T, **options):
    return compiled(T, **options).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_is_linear(causal, dtype):
    T = 16 * 1024
    small = temporary_bytes(T, causal=causal, dtype=dtype)
    large = temporary_bytes(4 * T, causal=causal, dtype=dtype)
    assert large <= 4.2 * small
    assert large < 64 * 2**20 < 4 * (4 * T) ** 2  # beside the scores of one head


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_with_small_tiles_too(causal):
    """The schedule has (T / 64)^2 tiles: it must not be held at once."""
    small = temporary_bytes(2**15, N=1, causal=causal, blocks=(64, 64))
    large = temporary_bytes(2**17, N=1, causal=causal, blocks=(64, 64))
    assert large <= 4.2 * small


def test_131072_positions_fit_in_128_mib():
    assert temporary_bytes(131072, N=1, H=64, causal=True) < 128 * 2**20


def test_the_program_does_not_grow_with_the_length():
    sizes = [len(compiled(T, causal=True, blocks=(64, 64)).as_text()) for T in (2**10, 2**16)]
    assert sizes[1] < 1.05 * sizes[0]
