"""In 8 bits, too, what may not be seen changes nothing, and what is seen shows."""

import jax
import numpy as np
import pytest
from integers import PROBABILITIES, normal, quantized, relative_error
from jax import numpy as jnp
from options import TILES, B, K, N, S, T, int32, random_inputs
from oracle import attention

from flash_jax import (
    LengthMask,
    PrefixMask,
    QuantizedArray,
    WindowMask,
    flash_attention_int8,
    flash_attention_int8_with_lse,
    quantize,
)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_what_lies_beyond_the_lengths_changes_nothing(garbage, rng):
    query, key, value = random_inputs(rng)
    lengths = {"query_seq_lengths": int32(T, 5), "key_value_seq_lengths": int32(13, 9)}
    before = flash_attention_int8_with_lse(query, key, value, **lengths, block_sizes=TILES)
    for x, length in ((query, (T, 5)), (key, (13, 9)), (value, (13, 9))):
        for b in range(B):
            x[b, length[b] :] = garbage
    after = flash_attention_int8_with_lse(query, key, value, **lengths, block_sizes=TILES)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


HIDING = "padding mask", "bias", "lengths", "causal", "segments", "either"


def some_hidden(name, hidden):
    """Options that hide keys S - hidden.. from every query."""
    kept = np.arange(S) < S - hidden
    return {
        "padding mask": {"mask": kept[None, None, None, :]},
        "bias": {"bias": np.where(kept, 0, -np.inf).astype(np.float32)},
        "lengths": {"key_value_seq_lengths": int32(*[S - hidden] * B)},
        "causal": {"is_causal": True, "query_offset": S - hidden - T},
        "segments": {
            "query_segment_ids": np.full((B, T), 3),
            "key_value_segment_ids": np.broadcast_to(np.where(kept, 3, 7), (B, S)),
        },
        "either": {"mask": (LengthMask(kv=S - hidden) & WindowMask(S, S)) | PrefixMask(2)},
    }[name]


@pytest.mark.parametrize(
    ("name", "garbage"), [*((name, np.nan) for name in HIDING), ("bias", 1e3), ("lengths", 1e3)]
)
def test_keys_and_values_that_no_query_reads_change_nothing(name, garbage, rng):
    query, key, value = random_inputs(rng)
    options = some_hidden(name, 4) | {"block_sizes": TILES}
    before = flash_attention_int8_with_lse(query, key, value, **options)
    key[:, -4:] = value[:, -4:] = garbage
    after = flash_attention_int8_with_lse(query, key, value, **options)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)
    offset = {"is_causal": True, "query_offset": S - 4 - T} if name == "causal" else {}
    exact = attention(query, key[:, :-4], value[:, :-4], **offset)[0]
    assert relative_error(after[0], exact) < 0.03


def test_a_nan_in_one_key_spoils_the_smoothing_of_no_other(rng):
    query, key, value = normal(rng, 129, 64)
    key += 20 * rng.standard_normal(64).astype(np.float32)
    exact = attention(query, key, value, is_causal=True)[0]
    key[:, -1, :, 3] = np.nan
    out = flash_attention_int8(query, key, value, is_causal=True)
    assert relative_error(out[:, :-1], exact[:, :-1]) < 0.015
    assert np.isnan(np.asarray(out[:, -1])).all()


def test_a_row_that_reads_no_key_is_zero_whatever_the_scales_are(rng):
    query, key, value = random_inputs(rng)
    value[0, 3, 1, 0] = np.nan
    for layout in ((1, None, 1, 1), None):
        quantized_value = jax.jit(lambda x, layout=layout: quantize(x, layout))(value)
        out = flash_attention_int8(
            query,
            key,
            quantized_value,
            is_causal=True,
            query_offset=-4,
            probability_dtype="float32",
        )
        np.testing.assert_array_equal(out[:, :4], np.zeros_like(out[:, :4]))


def test_keys_whose_mean_or_difference_overflows(rng):
    key = np.array([3.3e38, -3.3e38, -3.3e38, 0], np.float32)[None, :, None, None]
    query, value = np.full((1, 1, 1, 1), 1e-3, np.float32), np.eye(4, dtype=np.float32)
    out = flash_attention_int8(query, key, value[None, :, None])
    np.testing.assert_allclose(out[0, 0, 0], [1, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("of", ["key", "value"])
@PROBABILITIES
def test_what_is_not_finite_shows_in_the_rows_that_read_it_and_in_no_other(
    bad, of, probability_dtype, rng
):
    query, key, value = random_inputs(rng, T=S)
    (key if of == "key" else value)[1, 7, 2, 1] = bad
    options = {"is_causal": True, "block_sizes": TILES, "probability_dtype": probability_dtype}
    out = np.asarray(flash_attention_int8(query, key, value, **options))
    reads = np.zeros(out.shape, bool)
    reads[1, 7:, 2 * N // K :] = True
    np.testing.assert_array_equal(np.isnan(out), reads)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@PROBABILITIES
def test_a_query_that_is_not_finite_shows_in_its_row(bad, probability_dtype, rng):
    query, key, value = random_inputs(rng)
    query[1, 4, 2, 0] = bad
    out = flash_attention_int8(query, key, value, probability_dtype=probability_dtype)
    expected = np.zeros(out.shape, bool)
    expected[1, 4, 2] = True
    np.testing.assert_array_equal(np.isnan(out), expected)


@pytest.mark.parametrize("probability_dtype", ["uint8", "float32"])
def test_the_future_cannot_change_the_past_of_quantized_keys(probability_dtype, rng):
    query, key, value = random_inputs(rng, T=S)
    options = {"is_causal": True, "block_sizes": TILES, "probability_dtype": probability_dtype}
    key, value = quantized(key, value)
    before = flash_attention_int8(query, key, value, **options)
    key, value = (
        QuantizedArray(x.values.at[:, 6:].set(-99), x.scales, x.block_shape) for x in (key, value)
    )
    scales = key.scales.at[:, 6:].set(jnp.nan)
    key = QuantizedArray(key.values, scales, key.block_shape)
    after = flash_attention_int8(query.copy(), key, value, **options)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])


def test_the_future_moves_the_past_of_floats_by_a_rounding_only(rng):
    """Through the mean of the keys and the scales of the values."""
    query, key, value = normal(rng, 129, 64)
    before = flash_attention_int8(query, key, value, is_causal=True)
    key[:, 65:] *= 3
    value[:, 65:] *= 3
    after = flash_attention_int8(query, key, value, is_causal=True)
    exact = attention(query[:, :65], key[:, :65], value[:, :65], is_causal=True)[0]
    assert relative_error(before[:, :65], exact) < 0.015
    assert relative_error(after[:, :65], exact) < 0.04
