"""Attention in 8 bits: the kernels and flash_attention_int8.

On the grid below quantization changes nothing, so the oracle's exact result is the one to reach.
"""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax import export, lax
from jax import numpy as jnp
from options import OPTIONS, TILES, B, H, Hv, K, N, S, T, by_name, int32, named, random_inputs
from oracle import assert_within_bound, attention, max_error, numpy_attention

from flash_jax import (
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    PrefixMask,
    QuantizedArray,
    WindowMask,
    dequantize,
    flash_attention,
    flash_attention_forward_i8,
    flash_attention_int8,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
    flash_mha_i8,
    quantize,
)

IN_FLOAT32 = {"probability_dtype": "float32", "block_sizes": TILES}
PROBABILITIES = pytest.mark.parametrize("probability_dtype", ["uint8", "bfloat16", "float32"])


def on_grid(rng, *shape, axis):
    """Multiples of 1/64, the largest along the axis being 127/64: its scale is exactly 1/64."""
    integers = rng.integers(-126, 127, shape)
    np.put_along_axis(integers, np.argmax(np.abs(integers), axis, keepdims=True), 127, axis)
    return (integers / 64).astype(np.float32)


def grid_inputs(rng, B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv):
    """Queries and keys on the grid per row, values per channel; the mean of the keys is 0."""
    query = on_grid(rng, B, T, N, H, axis=-1)
    half = on_grid(rng, B, S // 2, K, H, axis=-1)
    key = np.concatenate([half, np.zeros((B, S % 2, K, H), np.float32), -half], axis=1)
    return query, key, on_grid(rng, B, S, K, Hv, axis=1)


def quantized(key, value, rows=1):
    """Keys with a scale per row or so, values with one per channel."""
    return quantize(key, (1, rows, 1, None)), quantize(value, (1, None, 1, 1))


def relative_error(x, exact):
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


def cosine(x, exact):
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return np.sum(x * exact) / np.linalg.norm(x) / np.linalg.norm(exact)


# --- Kernels


def random_integers(rng, *shape):
    return rng.integers(-127, 128, shape).astype(np.int8)


def integer_qkv(rng, *, N=6, K=3, T=37, S=61, H=5, Hv=3):
    return [random_integers(rng, *shape) for shape in ((N, T, H), (K, S, H), (K, S, Hv))]


SCALES = 0.011, 0.017, 0.023


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [(64, 64), (11, 7), (1, 1), (1000, 1000)])
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
    out = flash_mha_i8(config, *integers, 0.0, 0.1, 0.1)
    mean = np.repeat(integers[2].mean(axis=1, keepdims=True) * 0.1, 2, axis=0)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-5)
    eager = flash_mha_i8(config, *integers, *SCALES)
    traced = jax.jit(flash_mha_i8, static_argnums=0)(config, *integers, *SCALES)
    np.testing.assert_array_equal(eager, traced)


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


@pytest.mark.parametrize("size", [1e30, 1e15, 1e10])
@PROBABILITIES
def test_huge_logits_pick_the_largest(size, probability_dtype):
    q, k = np.full((1, 5, 1), 127, np.int8), np.arange(11, dtype=np.int8).reshape(1, 11, 1)
    v = (127 * np.eye(11)).astype(np.int8)[None]
    config = FlashAttentionConfig(2, 3, 1)
    out = flash_mha_i8(config, q, k, v, size, 1.0, 1.0, probability_dtype=probability_dtype)
    expected = np.zeros((1, 5, 11))
    expected[..., -1] = 127
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_tiles_and_heads_are_no_longer_than_int32_sums(rng):
    S = 2**16 + 2**14
    q, k = np.full((1, 1), 127, np.int8), np.full((S, 1), 127, np.int8)
    v = np.full((S, 2), 127, np.int8)
    out = flash_attention_forward_i8(FlashAttentionConfig(1, S, 1), q, k, v, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(out, [[127, 127]], rtol=1e-6)
    x = np.ones((1, 2**16 + 1), np.int8)
    with pytest.raises(ValueError, match="q must have a head size of at most 65536"):
        flash_attention_forward_i8(FlashAttentionConfig(1, 1, 2**16 + 1), x, x, x, 1.0, 1.0, 1.0)


# --- The integers in the compiled program


DOT = re.compile(r" = (\w+)\[[\d,]*\]\S* dot\((.*?)\), ")
TYPE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[")


def dots(function, *arguments):
    """(result, left, right) types of all matrix products."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = []
    for computation in text.split("\n\n"):
        types = dict(m.groups() for line in computation.splitlines() if (m := TYPE.match(line)))
        for result, operands in DOT.findall(computation):
            names = [re.findall(r"%([\w.-]+)", part)[-1] for part in operands.split(",")[:2]]
            found.append((result, *(types[name] for name in names)))
    return found


@pytest.mark.parametrize(
    ("probability_dtype", "weighing"),
    [
        ("uint8", ("s32", "u8", "s8")),
        ("bfloat16", ("f32", "bf16", "bf16")),
        ("float32", ("f32", "f32", "f32")),
    ],
)
@pytest.mark.parametrize("T", [1, 257])
def test_products_are_of_bytes(T, probability_dtype, weighing):
    x = jax.ShapeDtypeStruct((1, T, 4, 64), np.float32)
    kv = jax.ShapeDtypeStruct((1, 517, 2, 64), np.float32)
    call = functools.partial(flash_attention_int8, probability_dtype=probability_dtype)
    found = dots(functools.partial(call, is_causal=True, query_offset=3), x, kv, kv)
    assert found
    assert set(found) == {("s32", "u8", "s8"), weighing}


@pytest.mark.parametrize("T", [1, 130])
def test_kernel_products_are_of_bytes(T):
    q, kv = (jax.ShapeDtypeStruct((n, 64), np.int8) for n in (T, 129))
    config = FlashAttentionConfig(64, 64, 64, causal=True)
    call = functools.partial(flash_attention_forward_i8, config)
    assert set(dots(call, q, kv, kv, *SCALES)) == {("s32", "u8", "s8")}


# --- Options


# Masks of the same kind take the same way through the integers.
@named(
    *("none", "mask", "mask of keys", "bias of -inf", "causal bottom-right", "causal per element"),
    *("causal window", "lengths", "segments", "bias", "negative scale", "soft cap", "sinks"),
    *("sinks of rows without keys", "alibi at an offset", "everything"),
)
def test_every_option_agrees_with_the_oracle(options, rng):
    (query, key, value), options = grid_inputs(rng), options(rng)
    exact, plain = (attention(query, key, value, dtype=d, **options) for d in (None, np.float32))
    results = flash_attention_int8_with_lse(query, *quantized(key, value), **options, **IN_FLOAT32)
    assert_within_bound(results, exact, plain, np.float32)
    out = flash_attention_int8(query, *quantized(key, value), **options, **IN_FLOAT32)
    np.testing.assert_array_equal(results[0], out)


SHIFTED = {
    "none": {},
    "causal": {"is_causal": True},
    "soft cap": {"logits_soft_cap": 3.0, "is_causal": True},
    "sinks": {"sinks": np.linspace(-2, 9, N).astype(np.float32), "local_window_size": (4, 3)},
    "bias, alibi and scale": {
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
    "head of all batch elements": (None, None, 1, None),
    "rows": (1, 4, 1, None),
    "rows of all heads": (1, 3, None, None),
    "channel": (1, None, 1, 1),
    "channel of all": (None, None, None, 1),
}


@pytest.mark.parametrize(
    ("layout", "batched"),
    [*((layout, True) for layout in LAYOUTS.values()), (LAYOUTS["rows"], False)],
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
    floats = query, dequantize(key), dequantize(value)
    out = flash_attention_int8(query, key, value, **IN_FLOAT32)
    assert out.shape == flash_attention(*floats).shape
    per_channel = layout is not None and layout[-1] == 1
    # Scales per channel go into the queries, which are then off their grid.
    tolerance = 0.02 if per_channel else 2e-6
    np.testing.assert_allclose(out, flash_attention(*floats), atol=tolerance)


def test_float_and_quantized_inputs_mix(rng):
    query, key, value = grid_inputs(rng)
    k, v = quantized(key, value)
    expected = flash_attention_int8(query, k, v, **IN_FLOAT32)
    for inputs in ((key, v), (k, value), (key, value)):
        np.testing.assert_allclose(
            flash_attention_int8(query, *inputs, **IN_FLOAT32), expected, atol=1e-6
        )


def test_a_call_without_batch_is_one_of_a_batch(rng):
    query, key, value = random_inputs(rng)
    options = {"is_causal": True, "block_sizes": TILES}
    both = flash_attention_int8_with_lse(query[:1], key[:1], value[:1], **options)
    one = flash_attention_int8_with_lse(query[0], key[0], value[0], **options)
    for x, y in zip(one, both, strict=True):
        np.testing.assert_array_equal(x, y[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_16_bit_inputs_give_16_bit_outputs(dtype, rng):
    inputs = random_inputs(rng, dtype=dtype)
    out, lse = flash_attention_int8_with_lse(*inputs)
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    floats = flash_attention_int8(*(x.astype(np.float32) for x in inputs))
    np.testing.assert_array_equal(out, floats.astype(dtype))


@pytest.mark.parametrize(
    ("T", "S", "N", "K", "blocks"),
    [(1, 1, 2, 2, None), (1, 67, 4, 1, None), (67, 1, 6, 3, (7, 300)), (129, 257, 4, 2, (7, 300))],
)
@PROBABILITIES
def test_any_lengths_and_tiles(T, S, N, K, blocks, probability_dtype, rng):
    inputs = random_inputs(rng, T=T, S=S, N=N, K=K, H=16, Hv=9)
    out = flash_attention_int8(
        *inputs, block_sizes=blocks, probability_dtype=probability_dtype, is_causal=True
    )
    exact = attention(*inputs, is_causal=True)[0]
    assert relative_error(out, exact) < 0.025


@pytest.mark.parametrize("empty", ["B", "T", "S", "N"])
def test_an_empty_axis_gives_an_empty_or_zero_output(empty):
    sizes = {"B": 2, "T": 3, "S": 4, "N": 2} | {empty: 0}
    b, t, s, n = sizes.values()
    out, lse = flash_attention_int8_with_lse(
        jnp.ones((b, t, n, 5)), jnp.ones((b, s, n, 5)), jnp.ones((b, s, n, 3))
    )
    np.testing.assert_array_equal(out, np.zeros((b, t, n, 3)))
    assert lse.shape == (b, n, t)
    assert np.isneginf(lse).all()


# --- Accuracy


def normal(rng, S, H, T=None):
    shapes = (1, T or S, 2, H), (1, S, 2, H), (1, S, 2, H)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("H", "offset"), [(128, 0), (64, 20)])
@PROBABILITIES
def test_error_on_normal_data(H, offset, probability_dtype, rng):
    """Channels of the keys are off by up to some 20 standard deviations, or by none."""
    query, key, value = normal(rng, 1024, H)
    key += offset * rng.standard_normal(H).astype(np.float32)
    exact = attention(query, key, value)[0]
    out = flash_attention_int8(query, key, value, probability_dtype=probability_dtype)
    assert relative_error(out, exact) <= (0.015 if probability_dtype == "uint8" else 0.0125)
    assert cosine(out, exact) >= 0.9998


def test_without_smoothing_offset_channels_are_what_is_lost(rng):
    query, key, value = normal(rng, 512, 64)
    key += 20 * rng.standard_normal(64).astype(np.float32)
    exact = attention(query, key, value)[0]
    smoothed = flash_attention_int8(query, key, value)
    rough = flash_attention_int8(query, *quantized(key, value))
    assert relative_error(smoothed, exact) < 0.015 < 0.1 < relative_error(rough, exact)


def test_lse_with_offset_channels_is_that_of_the_scores(rng):
    query, key, value = normal(rng, 257, 64)
    key += 20 * rng.standard_normal(64).astype(np.float32)
    _, exact = attention(query, key, value)
    _, lse = flash_attention_int8_with_lse(query, key, value)
    assert max_error(lse, exact) < 0.02


@pytest.mark.parametrize("size", [0.0, 0.1, 0.5])
def test_error_of_nearly_uniform_attention_over_many_keys(size, rng):
    query, key, value = normal(rng, 8192, 64, T=67)
    exact = attention(size * query, key, value)[0]
    assert relative_error(flash_attention_int8(size * query, key, value), exact) <= 0.03


@pytest.mark.parametrize("H", [64])
@pytest.mark.parametrize("sharpness", [0.3, 4.0])
@pytest.mark.parametrize("probability_dtype", ["uint8", "bfloat16"])
def test_8_bit_probabilities_are_within_2_of_255_of_the_largest_value(
    H, sharpness, probability_dtype, rng
):
    query, key, value = grid_inputs(rng, T=129, S=1031, N=2, K=2, H=H, Hv=H)
    exact = attention(sharpness * query, key, value)[0]
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


# --- What may not be seen


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


HIDING = (
    "padding mask", "mask", "bias", "lengths", "LengthMask", "prefix", "causal", "window",
    "segments", "both", "either",
)  # fmt: skip


def some_hidden(name, hidden):
    """Options that hide keys S - hidden.. from every query."""
    kept = np.arange(S) < S - hidden
    return {
        "padding mask": {"mask": kept[None, None, None, :]},
        "mask": {"mask": np.broadcast_to(kept, (B, N, T, S))},
        "bias": {"bias": np.where(kept, 0, -np.inf).astype(np.float32)},
        "lengths": {"key_value_seq_lengths": int32(*[S - hidden] * B)},
        "LengthMask": {"mask": LengthMask(kv=S - hidden)},
        "prefix": {"mask": PrefixMask(S - hidden)},
        "causal": {"is_causal": True, "query_offset": S - hidden - T},
        "window": {"local_window_size": (S, 2), "query_offset": S - hidden - T - 2},
        "segments": {
            "query_segment_ids": np.full((B, T), 3),
            "key_value_segment_ids": np.broadcast_to(np.where(kept, 3, 7), (B, S)),
        },
        "both": {"mask": LengthMask(kv=S - hidden) & WindowMask(S, S)},
        "either": {"mask": LengthMask(kv=S - hidden) | PrefixMask(2)},
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
    if name == "window":
        offset = {"local_window_size": (S, 2), "query_offset": S - 4 - T - 2}
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
    for layout in ((1, None, 1, 1), (1, 1, 1, None), None):
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


@PROBABILITIES
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


def test_calls_are_bitwise_repeatable(rng):
    inputs = random_inputs(rng, T=257, S=515, H=16)
    first = flash_attention_int8(*inputs, is_causal=True)
    for _ in range(3):
        np.testing.assert_array_equal(first, flash_attention_int8(*inputs, is_causal=True))
    np.testing.assert_array_equal(
        first, jax.jit(lambda q, k, v: flash_attention_int8(q, k, v, is_causal=True))(*inputs)
    )


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


def test_strict_modes_of_jax(rng):
    inputs, options = grid_inputs(rng), OPTIONS["everything"](rng)
    query, key, value = (x.astype(jnp.bfloat16) for x in inputs)  # float32 converts less

    def results():
        return [
            *flash_attention_int8_with_lse(query, key, value, **options, block_sizes=TILES),
            *flash_attention_int8_with_lse(query, *quantized(key, value), block_sizes=TILES),
            jax.grad(lambda q: jnp.sum(flash_attention_int8(q, key, value)))(query),
            flash_mha_i8(FlashAttentionConfig(8, 8, 5), *integer_qkv(rng), *SCALES).shape,
        ]

    expected = results()
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
    ):
        for x, y in zip(results(), expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("x64")
def test_it_stays_float32_under_x64(rng):
    inputs = random_inputs(rng)
    out, lse = flash_attention_int8_with_lse(*inputs, **OPTIONS["everything"](rng))
    assert out.dtype == lse.dtype == np.float32


# --- Gradients


def standing_for(query, key, value):
    """In NumPy: what queries and smoothed keys become per row, and values per channel."""

    def rounded(x, axis):
        scale = np.max(np.abs(x), axis, keepdims=True) / np.float32(127)
        return np.round(x / np.where(scale == 0, 1, scale)) * scale

    mean = np.mean(key, axis=-3, keepdims=True)
    return rounded(query, -1), rounded(key - mean, -1) + mean, rounded(value, -3)


def weighted(call, weights):
    """A number whose gradient reaches every output."""

    def total(*inputs):
        out, lse = call(*inputs)
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(lse))

    return total


GRADIENTS = {
    "none": {},
    "causal": {"is_causal": True, "query_offset": 2},
    "soft cap and sinks": {"logits_soft_cap": 2.0, "sinks": np.ones(N, np.float32)},
}


@pytest.mark.parametrize(
    ("options", "batched"),
    [*((options, True) for options in GRADIENTS.values()), (GRADIENTS["none"], False)],
)
def test_gradients_are_those_of_the_floats_that_the_integers_stand_for(options, batched, rng):
    inputs = random_inputs(rng)
    inputs = inputs if batched else tuple(x[0] for x in inputs)
    weights = rng.standard_normal((*inputs[0].shape[:-1], Hv)).astype(np.float32)
    int8 = functools.partial(flash_attention_int8_with_lse, **options, block_sizes=TILES)
    floats = functools.partial(flash_attention_with_lse, **options)
    gradients = jax.grad(weighted(int8, weights), (0, 1, 2))(*inputs)
    # The sine of lse has another slope at the int8 result, which is off by as much as that.
    expected = jax.grad(weighted(floats, weights), (0, 1, 2))(*standing_for(*inputs))
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
        jax.grad(functools.partial(total, call), range(5))(*arguments) for call in (int8, floats)
    )
    for x, y in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * max(1, np.max(np.abs(y))))


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
    gradients, expected = (jax.grad(f, (0, 1, 2))(*scales) for f in (total, plain))
    np.testing.assert_allclose(gradients, expected, rtol=0.02, atol=0.5)


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
    reverse, forward = (d(lambda q: call(q, k, v))(q) for d in (jax.jacrev, jax.jacfwd))
    np.testing.assert_allclose(reverse, forward, atol=1e-6)
    rows = [jax.grad(lambda q, i=i: call(q, k, v).ravel()[i])(q) for i in range(12)]
    np.testing.assert_allclose(np.reshape(reverse, (12, *q.shape)), rows, atol=1e-6)


# --- Memory


def temporary_bytes(call, *arguments):
    return jax.jit(call).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_memory_is_linear(is_causal, with_gradient):
    def call(q, k, v):
        return jnp.sum(flash_attention_int8(q, k, v, is_causal=is_causal))

    call = jax.grad(call, (0, 1, 2)) if with_gradient else call
    small, large = (
        temporary_bytes(call, *[jax.ShapeDtypeStruct((1, T, 2, 16), np.float32)] * 3)
        for T in (2**14, 2**16)
    )
    assert large <= 4.2 * small
    assert large < 2**32 / 16  # far below one byte per pair


def test_a_quantized_cache_is_not_spread_to_floats():
    """Neither 4 bytes per entry, nor a float scale per entry."""
    S = 2**17
    cache = QuantizedArray(
        jax.ShapeDtypeStruct((1, S, 2, 64), np.int8),
        jax.ShapeDtypeStruct((1, S // 64, 2, 1), np.float32),
        (1, 64, 1, 64),
    )
    query = jax.ShapeDtypeStruct((1, 2, 4, 64), np.float32)
    call = functools.partial(flash_attention_int8, probability_dtype="bfloat16")
    assert temporary_bytes(call, query, cache, cache) < 3 * S * 2 * 64


# --- Errors


QUERY, KEY = np.ones((2, 5, 4, 8), np.float32), np.ones((2, 7, 2, 8), np.float32)
VALUE = KEY[..., :3]
BROKEN = QuantizedArray(KEY.astype(np.int8), np.ones(3, np.float32), (1, 1, 1, 8))
ERRORS = {
    "float64 query": (
        {"query": QUERY.astype(np.float64)},
        ValueError,
        "key must have the dtype of query, float64",
    ),
    "integer query": ({"query": QUERY.astype(np.int8)}, TypeError, "query must be one of"),
    "quantized query": ({"query": quantize(QUERY)}, TypeError, "query must be one of|an array"),
    "other head size": ({"key": KEY[..., :5]}, ValueError, "key must be"),
    "other length": ({"value": VALUE[:, :5]}, ValueError, "value must be"),
    "other length, quantized": ({"value": quantize(VALUE[:, :5])}, ValueError, "value must be"),
    "scales of both axes": (
        {"key": quantize(KEY, (1, 2, 1, 1))},
        ValueError,
        r"key\.scales must be constant along S or along H; their shape is \(2, 4, 2, 8\)",
    ),
    "value scales per row": (
        {"value": quantize(VALUE, (1, 1, 1, None))},
        ValueError,
        r"value\.scales must be constant along S with probability_dtype uint8",
    ),
    "broken scales": (
        {"key": BROKEN},
        ValueError,
        r"key\.scales must be one per block",
    ),
    "probability dtype": (
        {"probability_dtype": np.float16},
        ValueError,
        "probability_dtype must be one of uint8, bfloat16, float32",
    ),
    "no probability dtype": ({"probability_dtype": None}, ValueError, "probability_dtype must be"),
    "dropout": ({"dropout_rate": 0.1}, TypeError, "dropout_rate"),
    "soft cap": ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be"),
    "one segment array": (
        {"query_segment_ids": np.zeros((2, 5), np.int32)},
        ValueError,
        "key_value_segment_ids must be given",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_a_wrong_argument_is_named(changed, error, message):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE} | changed
    with jax.enable_x64(True), pytest.raises(error, match=message):
        flash_attention_int8(**arguments)


@pytest.mark.usefixtures("x64")
def test_float64_is_refused():
    with pytest.raises(TypeError, match=r"query must be float32, bfloat16 or float16"):
        flash_attention_int8(*(x.astype(np.float64) for x in (QUERY, KEY, VALUE)))


CONFIG = FlashAttentionConfig(8, 8, 5)
KERNEL_ERRORS = {
    "floats": ({"q": np.ones((3, 5), np.float32)}, TypeError, "q must be int8; its dtype is fl"),
    "a list": ({"k": [[1]]}, TypeError, "k must be an array"),
    "head size": ({"k": np.ones((4, 6), np.int8)}, ValueError, "k must be"),
    "negative scale": ({"k_scale": -1.0}, ValueError, "k_scale must be finite in float32"),
    "infinite scale": ({"v_scale": np.inf}, ValueError, "v_scale must be finite in float32"),
    "scale per row": ({"q_scale": np.ones(3)}, ValueError, "q_scale must be a scalar"),
    "no scale": ({"q_scale": None}, TypeError, "q_scale must be a real number"),
    "a bool": ({"q_scale": True}, TypeError, "q_scale must be a real number"),
    "complex": ({"q_scale": np.complex64(1)}, TypeError, "q_scale must be a real number"),
    "too large": ({"q_scale": 1e300}, ValueError, "q_scale must be finite in float32"),
    "far too large": ({"q_scale": 10**400}, ValueError, "q_scale must be finite in float32"),
    "a string": ({"q_scale": "1"}, TypeError, "q_scale must be"),
    "config": ({"config": (8, 8)}, TypeError, "config must be a FlashAttentionConfig"),
    "heads": ({"q": np.ones((2, 3, 5), np.int8)}, ValueError, "q must be"),
    "probability dtype": ({"probability_dtype": "int8"}, ValueError, "probability_dtype must be"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), KERNEL_ERRORS.values(), ids=KERNEL_ERRORS)
def test_a_wrong_kernel_argument_is_named(changed, error, message):
    arguments = {
        "config": CONFIG,
        "q": np.ones((3, 5), np.int8),
        "k": np.ones((4, 5), np.int8),
        "v": np.ones((4, 2), np.int8),
        "q_scale": 0.1,
        "k_scale": 0.1,
        "v_scale": 0.1,
    } | changed
    with pytest.raises(error, match=message):
        flash_attention_forward_i8(**arguments)
