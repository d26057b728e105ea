"""The kernels on int8: exact sums, scales, and the gradients of the scales."""

import math

import jax
import numpy as np
import pytest
from integers import SCALES, integer_qkv
from jax import numpy as jnp
from oracle import attention, max_error, numpy_attention
from unoptimized import run

from flash_jax import FlashAttentionConfig, flash_attention_forward_i8, flash_mha_i8, quantize


@pytest.mark.parametrize(
    ("blocks", "causal"),
    [((64, 64), True), ((11, 7), False), ((11, 7), True), ((1, 1), True), ((1000, 1000), False)],
)
def test_kernel_with_float_probabilities_is_as_accurate_as_float32(causal, blocks, rng):
    integers = integer_qkv(rng)
    floats = [np.float32(s) * x for s, x in zip(SCALES, integers, strict=True)]
    exact, _ = numpy_attention(*floats, is_causal=causal)
    plain = [jnp.swapaxes(x, 0, 1)[None] for x in floats]
    plain = jnp.swapaxes(attention(*plain, is_causal=causal, dtype=np.float32)[0][0], 0, 1)
    config = FlashAttentionConfig(*blocks, 5, causal)
    out = flash_mha_i8(config, *integers, *SCALES, probability_dtype="float32")
    assert out.dtype == np.float32
    eps = float(jnp.finfo(np.float32).eps) * max(1, np.max(np.abs(exact)))
    assert max_error(out, exact) <= 2 * max_error(plain, exact) + eps


def test_one_head_is_many_heads_of_one(rng):
    integers = integer_qkv(rng, N=3)
    config = FlashAttentionConfig(8, 8, 5, causal=True)
    many = flash_mha_i8(config, *integers, *SCALES)
    for n in range(3):
        one = flash_attention_forward_i8(config, *(x[n] for x in integers), *SCALES)
        np.testing.assert_allclose(one, many[n], atol=1e-6)


def test_the_example_of_the_first_crate(rng):
    """8 positions of size 4, of about 1: within 0.01 of float attention, where it promised 0.1."""
    q, k, v = (rng.uniform(-1, 1, (8, 4)).astype(np.float32) for _ in range(3))
    quantized = [quantize(x) for x in (q, k, v)]
    config = FlashAttentionConfig.for_head_dim(4)
    scales = [x.scales[0, 0] for x in quantized]
    out = flash_attention_forward_i8(config, *(x.values for x in quantized), *scales)
    exact, _ = numpy_attention(q[None], k[None], v[None])
    assert max_error(out, exact[0]) < 0.01


def test_kernel_scales_may_be_zero_or_traced(rng):
    integers = integer_qkv(rng)
    config = FlashAttentionConfig(8, 8, 5)
    traced = jax.jit(flash_mha_i8, static_argnums=0)
    out = traced(config, *integers, 0.0, 0.1, 0.1)
    mean = np.repeat(integers[2].mean(axis=1, keepdims=True) * 0.1, 2, axis=0)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-5)
    floats = [np.float32(s) * x for s, x in zip(SCALES, integers, strict=True)]
    exact, _ = numpy_attention(*floats)
    assert max_error(traced(config, *integers, *SCALES), exact) <= 2 / 255 * np.max(abs(floats[2]))


def test_integers_at_their_limits_are_summed_exactly():
    """-128 too, and sums that no 16 bits hold."""
    H, S = 515, 300
    q, k = np.full((1, 3, H), -128, np.int8), np.full((1, S, H), -128, np.int8)
    k[0, 7] = 127
    v = np.full((1, S, 2), 127, np.int8)
    v[0, 7] = -127
    config = FlashAttentionConfig(2, 64, H, softmax_scale=1.0)
    out = flash_mha_i8(config, q, k, v, 1.0, -0.0, 1.0)  # equal scores
    np.testing.assert_allclose(out, np.full((1, 3, 2), 127 * (S - 2) / S), rtol=1e-6)
    out = flash_mha_i8(config, q, k, v, 1.0, 1.0, 1.0)  # all but one key at the maximum
    np.testing.assert_allclose(out, np.full((1, 3, 2), 127), rtol=1e-6)


def test_tiles_and_heads_are_no_longer_than_int32_sums(rng):
    S = 2**16 + 2**14
    q, k = np.full((1, 1), 127, np.int8), np.full((S, 1), 127, np.int8)
    v = np.full((S, 2), 127, np.int8)
    out = flash_attention_forward_i8(FlashAttentionConfig(1, S, 1), q, k, v, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(out, [[127, 127]], rtol=1e-6)
    x = np.ones((1, 2**16 + 1), np.int8)
    with pytest.raises(ValueError, match="q must have a head size of at most 65536"):
        flash_attention_forward_i8(FlashAttentionConfig(1, 1, 2**16 + 1), x, x, x, 1.0, 1.0, 1.0)


def test_kernel_gradients_reach_the_scales(rng):
    q, k, v = integer_qkv(rng)
    config = FlashAttentionConfig(8, 8, 5, causal=True)
    total = lambda *scales: jnp.sum(jnp.sin(flash_mha_i8(config, q, k, v, *scales)))  # noqa: E731

    def plain(q_scale, k_scale, v_scale):
        s = jnp.einsum("nth,nsh->nts", q * q_scale, jnp.repeat(k, 2, 0) * k_scale) / math.sqrt(5)
        s = jnp.where(jnp.tri(*s.shape[1:], dtype=bool), s, -jnp.inf)
        out = jnp.einsum("nts,nsh->nth", jax.nn.softmax(s), jnp.repeat(v, 2, 0) * v_scale)
        return jnp.sum(jnp.sin(out))

    scales = 0.005, 0.007, 0.01
    gradients, expected = (run(jax.grad(f, (0, 1, 2)), *scales) for f in (total, plain))
    np.testing.assert_allclose(gradients, expected, rtol=0.02, atol=0.5)
