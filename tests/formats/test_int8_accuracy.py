"""How far attention in 8 bits is from that of the floats, as measured and as derived."""

import numpy as np
import pytest
from integers import cosine, exact_attention, grid_inputs, normal, quantized, relative_error
from oracle import attention, max_error

from flash_jax import dequantize, flash_attention_int8, flash_attention_int8_with_lse, quantize


@pytest.mark.parametrize(
    ("H", "offset", "probability_dtype"),
    [(128, 0, "uint8"), (64, 20, "uint8"), (128, 0, "float32"), (64, 20, "bfloat16")],
)
def test_error_on_normal_data(H, offset, probability_dtype, rng):
    """Channels of the keys are off by up to some 20 standard deviations, or by none."""
    query, key, value = normal(rng, 1024, H)
    key += offset * rng.standard_normal(H).astype(np.float32)
    exact, _ = exact_attention(query, key, value)
    out = flash_attention_int8(query, key, value, probability_dtype=probability_dtype)
    assert relative_error(out, exact) <= (0.015 if probability_dtype == "uint8" else 0.0125)
    assert cosine(out, exact) >= 0.9998


def test_without_smoothing_offset_channels_are_what_is_lost(rng):
    query, key, value = normal(rng, 1024, 64)
    key += 20 * rng.standard_normal(64).astype(np.float32)
    exact, _ = exact_attention(query, key, value)
    smoothed = flash_attention_int8(query, key, value)
    rough = flash_attention_int8(query, *quantized(key, value))
    assert relative_error(smoothed, exact) < 0.015 < 0.1 < relative_error(rough, exact)


def test_lse_with_offset_channels_is_that_of_the_scores(rng):
    query, key, value = normal(rng, 1024, 64)
    key += 20 * rng.standard_normal(64).astype(np.float32)
    _, exact = exact_attention(query, key, value)
    _, lse = flash_attention_int8_with_lse(query, key, value)
    assert max_error(lse, exact) < 0.02


@pytest.mark.parametrize("size", [0.0, 0.1, 0.5])
def test_error_of_nearly_uniform_attention_over_many_keys(size, rng):
    query, key, value = normal(rng, 8192, 64, T=67)
    exact, _ = exact_attention(size * query, key, value)
    assert relative_error(flash_attention_int8(size * query, key, value), exact) <= 0.03


@pytest.mark.parametrize("H", [64])
@pytest.mark.parametrize("sharpness", [0.3, 4.0])
@pytest.mark.parametrize("probability_dtype", ["uint8", "bfloat16"])
def test_8_bit_probabilities_are_within_2_of_255_of_the_largest_value(
    H, sharpness, probability_dtype, rng
):
    query, key, value = grid_inputs(rng, T=129, S=1031, N=2, K=2, H=H, Hv=H)
    exact, _ = exact_attention(sharpness * query, key, value)
    inputs = sharpness * query, *quantized(key, value)
    out = flash_attention_int8(*inputs, probability_dtype=probability_dtype)
    assert max_error(out, exact) <= 2 / 255 * np.max(np.abs(value))


def plateau(below, n=192):
    """One key at the maximum, n - 1 that are ``below`` it and all point the other way."""
    logits = np.full(n, -below)
    logits[5] = 0
    # On the grid: 127 / 127 of the largest, and the rest as near as it goes.
    scale = below / 127
    key = np.round(logits / scale).astype(np.float32)[None, :, None, None]
    value = np.where(logits == 0, -1, 1).astype(np.float32)[None, :, None, None]
    query = np.full((1, 3, 1, 1), scale, np.float32)
    return query, key, value


@pytest.mark.parametrize("below", [6.1, 6.3, 6.6, 9.0])
def test_the_worst_of_probabilities_is_bounded_as_derived(below):
    """Many just below 1/510 vanish in uint8, within its bound; in bfloat16 they do not."""
    query, key, value = plateau(below)
    exact = attention(query, key, value, scale=1.0)[0]
    inputs = query, quantize(key, (1, 1, 1, None)), quantize(value)
    n, l = key.shape[1], 1 + (key.shape[1] - 1) * np.exp(-below)
    out = flash_attention_int8(*inputs, scale=1.0)
    assert max_error(out, exact) <= min(n / 510, l - 1) / l + 1e-6
    if below > np.log(510):
        assert max_error(out, exact) > 2 / 255
    out = flash_attention_int8(*inputs, scale=1.0, probability_dtype="bfloat16")
    assert max_error(out, exact) <= 1 / 256
    out = flash_attention_int8(*inputs, scale=1.0, probability_dtype="float32")
    assert max_error(out, exact) <= 1e-6


@pytest.mark.parametrize(("rows", "bound"), [(None, 1 / 256), (1, 2 / 255)])
def test_the_worst_of_bfloat16_probabilities_is_bounded_as_derived(rows, bound):
    """All but one lie halfway between two bfloat16 numbers, and are rounded the same way."""
    S = 1024
    scores = np.full((1, 1, 3, S), np.log(0.5 + 2**-9 + 1e-6), np.float32)
    scores[..., 0] = 0
    query, ones = np.zeros((1, 3, 1, 2), np.float32), np.ones((1, S, 1, 2), np.float32)
    value = np.where(np.arange(S)[None, :, None, None] == 0, -1, ones * np.float32(0.501))
    value = quantize(value.astype(np.float32), (1, rows, 1, None))
    exact = attention(query, ones, dequantize(value), scores)[0]
    inputs = query, quantize(ones), value
    out = flash_attention_int8(*inputs, bias=scores, probability_dtype="bfloat16")
    error = max_error(out, exact) / np.max(np.abs(dequantize(value)))
    assert 1 / 2048 < error <= bound
