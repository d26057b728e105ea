"""Derivatives of attention in 8 bits: those of the floats that the integers stand for."""

import functools

import jax
import numpy as np
import pytest
from integers import grid_inputs, quantized, weighted
from jax import numpy as jnp
from options import TILES, B, Hv, N, S, T, random_inputs
from unoptimized import UNOPTIMIZED, run

from flash_jax import (
    QuantizedArray,
    dequantize,
    flash_attention,
    flash_attention_int8,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
)


def standing_for(query, key, value):
    """In NumPy: what queries and smoothed keys become per row, and values per channel."""

    def rounded(x, axis):
        scale = np.max(np.abs(x), axis, keepdims=True) / np.float32(127)
        return np.round(x / np.where(scale == 0, 1, scale)) * scale

    mean = np.mean(key, axis=-3, keepdims=True)
    return rounded(query, -1), rounded(key - mean, -1) + mean, rounded(value, -3)


GRADIENTS = {
    "none": {},
    "causal": {"is_causal": True, "query_offset": 2},
    "parameters": {"logits_soft_cap": 2.0, "sinks": np.ones(N, np.float32)},
}


@pytest.mark.parametrize(
    ("options", "batched"),
    [(GRADIENTS["none"], False), (GRADIENTS["causal"], True), (GRADIENTS["parameters"], True)],
)
def test_gradients_are_those_of_the_floats_that_the_integers_stand_for(options, batched, rng):
    inputs = random_inputs(rng)
    inputs = inputs if batched else tuple(x[0] for x in inputs)
    weights = rng.standard_normal((*inputs[0].shape[:-1], Hv)).astype(np.float32)
    int8 = functools.partial(flash_attention_int8_with_lse, **options, block_sizes=TILES)
    floats = functools.partial(flash_attention_with_lse, **options)
    gradients = run(jax.grad(weighted(int8, weights), (0, 1, 2)), *inputs)
    # The sine of lse has another slope at the int8 result, which is off by as much as that.
    expected = run(jax.grad(weighted(floats, weights), (0, 1, 2)), *standing_for(*inputs))
    for x, y in zip(gradients, expected, strict=True):
        assert x.dtype == np.float32
        assert np.max(np.abs(np.asarray(y))) > 0.1
        np.testing.assert_allclose(x, y, atol=0.02 * np.max(np.abs(np.asarray(y))))


def test_gradients_of_the_output_are_exact(rng):
    """A linear function of the output: nothing depends on where the int8 result lies."""
    inputs = grid_inputs(rng)
    weights = rng.standard_normal((B, T, N, Hv)).astype(np.float32)
    total = lambda call: lambda *x: jnp.sum(call(*x) * weights)  # noqa: E731
    gradients = jax.grad(total(flash_attention_int8), (0, 1, 2))(*inputs)
    expected = jax.grad(total(flash_attention), (0, 1, 2))(*inputs)
    for x, y in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_forward_mode_agrees_with_reverse_mode(rng):
    inputs, moving = random_inputs(rng), random_inputs(rng)
    weights = rng.standard_normal((B, T, N, Hv)).astype(np.float32)
    total = weighted(flash_attention_int8_with_lse, weights)
    _, tangent = jax.jvp(total, inputs, moving)
    gradients = jax.grad(total, (0, 1, 2))(*inputs)
    products = sum(np.sum(x * y) for x, y in zip(gradients, moving, strict=True))
    np.testing.assert_allclose(tangent, products, rtol=1e-4)


def test_gradients_reach_bias_scale_and_the_scales_of_quantized_keys(rng):
    query, key, value = grid_inputs(rng)
    k, v = quantized(key, value)
    bias = rng.standard_normal((N, 1, S)).astype(np.float32)

    def total(call, query, k_scales, v_scales, bias, scale):
        scaled = (
            QuantizedArray(x.values, scales, x.block_shape)
            for x, scales in ((k, k_scales), (v, v_scales))
        )
        return jnp.sum(jnp.sin(call(query, *scaled, bias=bias, scale=scale)))

    floats = lambda q, k, v, **options: flash_attention(  # noqa: E731
        q, dequantize(k), dequantize(v), **options
    )
    int8 = functools.partial(flash_attention_int8, probability_dtype="float32")
    arguments = query, k.scales, v.scales, bias, jnp.float32(0.4)
    gradients, expected = (
        run(jax.grad(functools.partial(total, call), range(5)), *arguments)
        for call in (int8, floats)
    )
    for x, y in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * max(1, np.max(np.abs(y))))


def test_gradients_that_are_not_asked_for_are_not_computed(rng):
    inputs, bias = random_inputs(rng), rng.standard_normal((N, T, S)).astype(np.float32)
    call = lambda q, *kv: jnp.sum(flash_attention_int8(q, *kv, bias=bias))  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(call))(*inputs))
    assert "wrt=('q',)" in text
    assert "'bias'" not in text


@pytest.mark.parametrize(
    ("call", "lead"),
    [(flash_attention, 1), (flash_attention_int8, 1), (flash_attention_int8, None)],
)
def test_jacobians_of_a_single_element(call, lead, rng):
    """Where the batch has one element, every row of a vmapped gradient is its own."""
    q, k, v = random_inputs(rng, B=lead, T=3, S=4, N=2, K=1, H=3, Hv=2)
    attend = lambda q: call(q, k, v)  # noqa: E731
    reverse, forward = (run(d(attend), q) for d in (jax.jacrev, jax.jacfwd))
    np.testing.assert_allclose(reverse, forward, atol=1e-6)
    row = jax.jit(jax.grad(lambda q, i: attend(q).ravel()[i]), compiler_options=UNOPTIMIZED)
    rows = [row(q, i) for i in range(12)]
    np.testing.assert_allclose(np.reshape(reverse, (12, *q.shape)), rows, atol=1e-6)
