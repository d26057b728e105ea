"""Attention in 8 bits with every option, layout of scales and transformation.

On the grid of ``integers`` quantization changes nothing, so the oracle's exact result is reached.
"""

import functools

import jax
import numpy as np
import pytest
from integers import IN_FLOAT32, grid_inputs, on_grid, quantized, relative_error
from jax import export, lax
from jax import numpy as jnp
from options import OPTIONS, TILES, N, S, T, by_name, int32, named, random_inputs
from oracle import assert_within_bound, attention

from flash_jax import (
    CausalMask,
    PrefixMask,
    WindowMask,
    dequantize,
    flash_attention_int8,
    flash_attention_int8_with_lse,
    quantize,
)

# --- Options


# Masks of the same kind take the same way through the integers.
@named(
    *("none", "mask", "mask of keys", "bias of -inf", "causal per element", "causal window"),
    *("segments", "negative scale", "parameters", "lengths and sinks", "everything"),
)
def test_every_option_agrees_with_the_oracle(options, rng):
    (query, key, value), options = grid_inputs(rng), options(rng)
    exact, plain = (attention(query, key, value, dtype=d, **options) for d in (None, np.float32))
    results = flash_attention_int8_with_lse(query, *quantized(key, value), **options, **IN_FLOAT32)
    assert_within_bound(results, exact, plain, np.float32)


SHIFTED = {
    "none": {},
    "soft cap and sinks": {
        "logits_soft_cap": 3.0,
        "sinks": np.linspace(-2, 9, N).astype(np.float32),
        "local_window_size": (4, 3),
    },
    "bias, alibi and scale": {
        "is_causal": True,
        "bias": np.linspace(0, 1, S).astype(np.float32),
        "alibi_slopes": np.linspace(0, 1, N).astype(np.float32),
        "scale": -0.3,
    },
}


@by_name(SHIFTED)
def test_smoothing_changes_no_score_of_any_option(options, rng):
    """Keys around 16 in every channel: the mean is taken out and put back exactly."""
    query, key, value = grid_inputs(rng, T=S)
    key = key + np.float32(16)
    exact, plain = (attention(query, key, value, dtype=d, **options) for d in (None, np.float32))
    results = flash_attention_int8_with_lse(query, key, value, **options, **IN_FLOAT32)
    assert_within_bound(results, exact, plain, np.float32)


MASKS = {
    "causal or prefix": (
        lambda: PrefixMask(int32(2, 5)) | CausalMask(1),
        lambda t, s: (s < int32(2, 5)[:, None, None, None]) | (s <= t + 1),
    ),
    "window": (lambda: WindowMask(2, 1), lambda t, s: (s >= t - 2) & (s <= t + 1)),
}


@pytest.mark.parametrize(("mask", "kept"), MASKS.values(), ids=MASKS)
def test_mask_objects_agree_with_the_oracle(mask, kept, rng):
    query, key, value = grid_inputs(rng)
    kept = kept(np.arange(T)[:, None], np.arange(S)[None, None, None])
    exact, plain = (attention(query, key, value, mask=kept, dtype=d) for d in (None, np.float32))
    inputs = query, *quantized(key, value)
    results = flash_attention_int8_with_lse(*inputs, mask=mask(), **IN_FLOAT32)
    assert_within_bound(results, exact, plain, np.float32)


LAYOUTS = {
    "tensor": None,
    "head": (1, None, 1, None),
    "rows of all heads": (1, 3, None, None),
    "channel of all": (None, None, None, 1),
}


@pytest.mark.parametrize(
    ("layout", "batched"),
    [*((layout, True) for layout in LAYOUTS.values()), ((1, 4, 1, None), False)],
)
def test_keys_and_values_of_any_scales(layout, batched, rng):
    """They stand for what dequantize gives, whatever share a scale."""
    query, key, value = random_inputs(rng)
    # Within 1e-3 of the grid of every row.
    query = on_grid(rng, *query.shape, axis=-1)
    if not batched:
        query, key, value = query[0], key[0], value[0]
        layout = layout if layout is None else layout[1:]
    key, value = quantize(key, layout), quantize(value, layout)
    exact = attention(query, dequantize(key), dequantize(value))[0]
    out = flash_attention_int8(query, key, value, **IN_FLOAT32)
    assert out.shape == exact.shape
    per_channel = layout is not None and layout[-1] == 1
    # Scales per channel go into the queries, which are then off their grid.
    tolerance = 0.02 if per_channel else 2e-6
    np.testing.assert_allclose(out, exact, atol=tolerance)


def test_float_and_quantized_inputs_mix(rng):
    """Floats alone are below, and integers alone above."""
    query, key, value = grid_inputs(rng)
    k, v = quantized(key, value)
    exact = attention(query, key, value)[0]
    for inputs in ((key, v), (k, value)):
        out = flash_attention_int8(query, *inputs, **IN_FLOAT32)
        np.testing.assert_allclose(out, exact, atol=1e-6)
    same, _ = flash_attention_int8_with_lse(query, k, value, **IN_FLOAT32)
    np.testing.assert_array_equal(out, same)


def test_a_call_without_batch_is_one_of_a_batch(rng):
    inputs = [x[0] for x in grid_inputs(rng)]
    options = {"is_causal": True, "query_offset": S - T}
    exact, plain = (attention(*inputs, dtype=d, **options) for d in (None, np.float32))
    results = flash_attention_int8_with_lse(*inputs, **options, **IN_FLOAT32)
    assert_within_bound(results, exact, plain, np.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_16_bit_inputs_give_16_bit_outputs(dtype, rng):
    inputs = random_inputs(rng, dtype=dtype)
    out, lse = flash_attention_int8_with_lse(*inputs)
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    floats, _ = flash_attention_int8_with_lse(*(x.astype(np.float32) for x in inputs))
    np.testing.assert_array_equal(out, floats.astype(dtype))


@pytest.mark.parametrize(
    ("T", "S", "N", "K", "blocks", "probability_dtype"),
    [
        (1, 1, 2, 2, None, "bfloat16"),
        (1, 67, 4, 1, None, "uint8"),
        (1, 67, 4, 1, None, "float32"),
        (67, 1, 6, 3, (7, 300), "uint8"),
        *((129, 257, 4, 2, (7, 300), dtype) for dtype in ("uint8", "bfloat16", "float32")),
    ],
)
def test_any_lengths_and_tiles(T, S, N, K, blocks, probability_dtype, rng):
    inputs = random_inputs(rng, T=T, S=S, N=N, K=K, H=16, Hv=9)
    out = flash_attention_int8(
        *inputs, block_sizes=blocks, probability_dtype=probability_dtype, is_causal=True
    )
    exact = attention(*inputs, is_causal=True)[0]
    assert relative_error(out, exact) < 0.025


# --- Transformations


def test_vmap_is_a_loop(rng):
    inputs = [np.stack(x) for x in zip(*(random_inputs(rng) for _ in range(3)), strict=True)]
    lengths = np.array([[3, S], [S, 5], [7, 8]], np.int32)
    call = functools.partial(flash_attention_int8, block_sizes=TILES)
    mapped = jax.vmap(lambda q, k, v, n: call(q, k, v, key_value_seq_lengths=n))(*inputs, lengths)
    for i in range(3):
        one = call(*(x[i] for x in inputs), key_value_seq_lengths=lengths[i])
        np.testing.assert_allclose(mapped[i], one, atol=1e-6)


def test_vmap_and_scan_over_quantized_keys(rng):
    query, key, value = random_inputs(rng, B=3)
    k, v = quantize(key, (1, 4, 1, None)), quantize(value, (1, None, 1, 1))
    expected = flash_attention_int8(query, k, v)
    mapped = jax.vmap(flash_attention_int8)(query, k, v)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)
    _, scanned = lax.scan(lambda c, x: (c, flash_attention_int8(*x)), 0, (query, k, v))
    np.testing.assert_allclose(scanned, expected, atol=1e-6)


def test_an_exported_call_takes_quantized_keys(rng):
    query, key, value = grid_inputs(rng)
    inputs = query, *quantized(key, value)
    exported = export.export(jax.jit(flash_attention_int8))(*inputs)
    again = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(*inputs), flash_attention_int8(*inputs))


@pytest.mark.usefixtures("x64")
def test_it_stays_float32_under_x64(rng):
    inputs = random_inputs(rng)
    out, lse = flash_attention_int8_with_lse(*inputs, **OPTIONS["everything"](rng))
    assert out.dtype == lse.dtype == np.float32
