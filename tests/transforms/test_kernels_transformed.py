"""The kernels under vmap, scan, export and jit."""

import functools

import jax
import numpy as np
import pytest
from jax import export, lax
from jax import numpy as jnp
from oracle import random_qkv

from flash_jax import FlashAttentionConfig, flash_attention_forward, flash_mha

CONFIG = FlashAttentionConfig(16, 8, 5, causal=True)
mha = functools.partial(flash_mha, CONFIG)


@pytest.fixture
def qkv(rng):
    return random_qkv(rng, lead=(3,), N=4, K=2, T=37, S=41, H=5)


def test_vmap_is_a_loop_over_the_batch(qkv):
    expected = jnp.stack([mha(*(x[i] for x in qkv)) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(mha)(*qkv), expected)
    moved = jax.jit(jax.vmap(mha, in_axes=(1, 0, 2), out_axes=3))(
        jnp.moveaxis(qkv[0], 0, 1), qkv[1], jnp.moveaxis(qkv[2], 0, 2)
    )
    np.testing.assert_array_equal(jnp.moveaxis(moved, 3, 0), expected)


def test_vmap_leaves_shared_arguments_alone(qkv):
    q, k, v = qkv
    expected = jnp.stack([mha(q[i], k[0], v[0]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(mha, in_axes=(0, None, None))(q, k[0], v[0]), expected)
    nested = jax.vmap(jax.vmap(mha, in_axes=(None, 0, 0)), in_axes=(0, None, None))(*qkv)
    for i, j in np.ndindex(3, 3):
        np.testing.assert_array_equal(nested[i, j], mha(q[i], k[j], v[j]))


def test_vmap_over_heads_of_the_single_head_kernel(qkv):
    q, k, v = (x[0] for x in qkv)
    one = functools.partial(flash_attention_forward, CONFIG)
    np.testing.assert_allclose(jax.vmap(one)(q[:2], k, v), mha(q[:2], k, v), atol=1e-6)


def test_scan_over_layers(qkv):
    q, k, v = qkv
    _, scanned = lax.scan(lambda carry, x: (carry, mha(*x)), None, qkv)
    np.testing.assert_array_equal(scanned, jax.vmap(mha)(q, k, v))


def test_export_round_trip(qkv):
    q, k, v = (x[0] for x in qkv)
    exported = export.export(jax.jit(mha))(q, k, v)
    reloaded = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(reloaded.call(q, k, v), mha(q, k, v))


def test_eager_calls_are_compiled_once(qkv):
    q, k, v = (x[0] for x in qkv)
    config = FlashAttentionConfig(13, 9, 5)  # of no other test
    with jax.log_compiles(False):
        flash_mha(config, q, k, v)
        with jax.no_tracing():
            flash_mha(config, q, k, v)


def test_config_is_a_static_argument(qkv):
    jitted = jax.jit(flash_mha, static_argnums=0)
    q, k, v = (x[0] for x in qkv)
    assert jitted.lower(CONFIG, q, k, v).out_info.shape == q.shape
