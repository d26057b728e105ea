"""Attention of models agrees with the oracle: every option, any sizes, dtypes and tiles."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from options import (
    MASKING,
    OPTIONS,
    TILES,
    B,
    S,
    T,
    by_name,
    everything,
    int32,
    named,
    random_inputs,
)
from oracle import assert_within_bound, attention, finite_error

from flash_jax import BlockSizes, flash_attention, flash_attention_with_lse, merge_attention

# --- Agreement with the oracle


# What only masks is in masks/test_masking.py.
@by_name({name: option for name, option in OPTIONS.items() if name not in MASKING})
def test_every_option_agrees_with_the_oracle(options, rng):
    inputs, options = random_inputs(rng), options(rng)
    exact = attention(*inputs, **options)
    plain = attention(*inputs, dtype=np.float32, **options)
    results = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    assert_within_bound(results, exact, plain, np.float32)


@named("none", "everything")
def test_the_output_is_the_same_without_lse(options, rng):
    inputs, options = random_inputs(rng), options(rng)
    out, _ = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    np.testing.assert_array_equal(out, flash_attention(*inputs, **options, block_sizes=TILES))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        *((name, (8, 16)) for name in ("none", "segments", "everything")),
        *((name, None) for name in ("bias of -inf", "causal window", "everything")),
    ],
)
def test_tiles_of_any_size_agree_with_the_oracle(name, blocks, rng):
    inputs, options = random_inputs(rng), OPTIONS[name](rng)
    exact, plain = (attention(*inputs, **options, dtype=dtype) for dtype in (None, np.float32))
    results = flash_attention_with_lse(*inputs, **options, block_sizes=blocks)
    assert_within_bound(results, exact, plain, np.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.bfloat16) for name in ("bias", "scale", "everything")),
        *((name, jnp.float16) for name in ("none", "scale", "soft cap", "everything")),
    ],
)
def test_with_16_bits_lse_is_as_accurate_as_float32(name, dtype, rng):
    inputs, options = random_inputs(rng, dtype=dtype), OPTIONS[name](rng)
    exact, plain = attention(*inputs, **options), attention(*inputs, dtype=dtype, **options)
    results = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    assert_within_bound(results, exact, plain, dtype)


@named("none", "everything")
@pytest.mark.usefixtures("x64")
def test_float64_is_computed_in_float64(options, rng):
    inputs, options = random_inputs(rng, dtype=np.float64), options(rng)
    exact = attention(*inputs, **options)
    results = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    for x, right in zip(results, exact, strict=True):
        assert x.dtype == np.float64
        assert finite_error(x, right) < 1e-14 * max(1, np.max(right))


@pytest.mark.parametrize(
    ("T", "S", "N", "K", "dtype"),
    [
        (1, 1, 2, 2, np.float32),
        (1, 67, 4, 1, np.float32),
        (67, 1, 6, 3, np.float32),
        (61, 67, 4, 1, jnp.bfloat16),
        (129, 257, 6, 3, np.float32),
        (129, 257, 6, 3, jnp.bfloat16),
        (257, 129, 1, 1, np.float32),
    ],
)
def test_any_lengths_and_groups_agree_with_the_oracle(T, S, N, K, dtype, rng):
    inputs = random_inputs(rng, T=T, S=S, N=N, K=K, dtype=dtype)
    options = {"is_causal": True, "query_offset": int32(S - T, S // 2)}
    exact, plain = attention(*inputs, **options), attention(*inputs, dtype=dtype, **options)
    assert_within_bound(flash_attention_with_lse(*inputs, **options), exact, plain, dtype)


def test_many_heads_and_tiles_with_everything_agree_with_the_oracle(rng):
    B, T, S, N, K = 1, 257, 263, 16, 8
    inputs = random_inputs(rng, B, T, S, N, K, H=3, Hv=2)
    options = {
        "bias": rng.standard_normal((N, T, S)).astype(np.float32),
        "mask": rng.random((N, T, S)) < 0.9,
        "is_causal": True,
        "query_offset": 6,
        "key_value_seq_lengths": int32(211),
        "sinks": rng.standard_normal(N).astype(np.float32),
        "alibi_slopes": rng.random(N).astype(np.float32) / 16,
    }
    exact, plain = (attention(*inputs, **options, dtype=dtype) for dtype in (None, np.float32))
    for blocks in (None, (64, 48)):
        results = flash_attention_with_lse(*inputs, **options, block_sizes=blocks)
        assert_within_bound(results, exact, plain, np.float32)


def test_a_call_without_batch_agrees_with_the_oracle(rng):
    """Lengths, offsets and segments have no batch axis either; a bias and a mask may have it."""
    inputs, options = [x[0] for x in random_inputs(rng, B=1)], everything(rng)
    options = {
        name: x[:1] if np.ndim(x) == 4 else x[0] if np.ndim(x) in (1, 2) else x
        for name, x in options.items()
        if name not in ("local_window_size", "sinks", "alibi_slopes")
    } | {name: options[name] for name in ("local_window_size", "sinks", "alibi_slopes")}
    exact, plain = (attention(*inputs, **options, dtype=dtype) for dtype in (None, np.float32))
    results = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    assert_within_bound(results, exact, plain, np.float32)


def test_block_sizes_are_any_pair(rng):
    inputs = random_inputs(rng)
    first, *others = (
        flash_attention_with_lse(*inputs, is_causal=True, block_sizes=blocks)
        for blocks in ([5, 3], (5, 3), BlockSizes(5, 3), (np.int64(5), 3))
    )
    for other in others:
        for x, y in zip(first, other, strict=True):
            np.testing.assert_array_equal(x, y)


# --- The ends of the range of integers


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"local_window_size": (None, 5)}], ids=["causal", "window"]
)
def test_an_offset_of_any_size_lets_all_keys_or_none_be_read(options, rng):
    inputs = random_inputs(rng)
    limits = np.iinfo(np.int32)
    run = functools.partial(flash_attention_with_lse, *inputs, **options, block_sizes=TILES)
    everything = attention(*inputs)[1]
    assert finite_error(run(query_offset=limits.max)[1], everything) < 2e-6
    assert np.isneginf(run(query_offset=limits.min)[1]).all()


@pytest.mark.usefixtures("x64")
def test_segments_that_differ_beyond_32_bits_differ(rng):
    inputs = random_inputs(rng)
    ids = {"query_segment_ids": np.full((B, T), 2**32 + 1)}
    for key_id, equal in ((2**32 + 1, True), (1, False)):
        keys = {"key_value_segment_ids": np.full((B, S), key_id)}
        _, lse = flash_attention_with_lse(*inputs, **ids, **keys, block_sizes=TILES)
        assert np.isfinite(np.asarray(lse)).all() == equal


# --- One program, whatever calls it


@named("parameters", "everything")
def test_constants_traced_options_and_eager_calls_give_the_same_bits(options, rng):
    inputs, options = random_inputs(rng), options(rng)
    static = {
        name: options.pop(name) for name in ("is_causal", "local_window_size") if name in options
    }
    run = functools.partial(flash_attention_with_lse, **static, block_sizes=TILES)
    eager = run(*inputs, **options)
    constant = jax.jit(lambda *inputs: run(*inputs, **options))(*inputs)
    traced = jax.jit(run)(*inputs, **options)
    for x, y, z in zip(eager, constant, traced, strict=True):
        np.testing.assert_array_equal(x, z)
        np.testing.assert_array_equal(x, y)


def test_vmap_over_every_array_is_a_loop(rng):
    inputs = [np.stack(x) for x in zip(*(random_inputs(rng) for _ in range(3)), strict=True)]
    drawn = [everything(rng) for _ in range(3)]
    static = {name: drawn[0][name] for name in ("is_causal", "local_window_size")}
    stacked = {
        name: np.stack([np.asarray(x[name], np.asarray(x[name]).dtype) for x in drawn])
        for name in drawn[0]
        if name not in static
    }
    stacked["scale"] = np.array([0.2, 0.3, -1.1], np.float32)
    stacked["logits_soft_cap"] = np.array([2.0, 30.0, 1.3], np.float32)
    stacked["query_offset"] += np.arange(3, dtype=np.int32)[:, None]
    run = functools.partial(flash_attention_with_lse, **static, block_sizes=TILES)
    mapped = jax.vmap(lambda inputs, options: run(*inputs, **options))(inputs, stacked)
    for i in range(3):
        single = run(*(x[i] for x in inputs), **{name: x[i] for name, x in stacked.items()})
        for x, y in zip(mapped, single, strict=True):
            np.testing.assert_array_equal(x[i], y)


def test_finite_results_pass_where_jax_checks_for_infinities(rng):
    """Some rows see nothing in some tiles, and in the first part; no output is infinite."""
    q, k, v = random_inputs(rng)
    options = {"is_causal": True, "key_value_seq_lengths": int32(3, 9)}
    parts = [
        flash_attention_with_lse(q, k[:, a:], v[:, a:], key_value_seq_lengths=lengths)
        for a, lengths in ((0, int32(3, 0)), (3, int32(14, 14)))
    ]
    assert np.isneginf(parts[0][1]).any()
    with jax.debug_nans(True), jax.debug_infs(True):
        results = flash_attention_with_lse(q, k, v, **options, block_sizes=(4, 4))
        merged = merge_attention(*zip(*parts, strict=True))
    assert finite_error(results[0], attention(q, k, v, **options)[0]) < 1e-6
    assert np.isfinite(np.asarray(merged[1])).all()


# --- Huge logits


HUGE = {
    "scale": {"scale": 1.37e10},
    "soft cap": {"scale": 1.37e10, "logits_soft_cap": 7.3e10},
    "bias": {"bias": 1.37e10 * np.arange(11, dtype=np.float32)},
    "alibi": {"alibi_slopes": np.full(1, 1.37e10, np.float32), "query_offset": 10},
}


@pytest.mark.parametrize(
    ("name", "H", "blocks"),
    [
        *((name, 2, (2, 3)) for name in HUGE),
        *((name, 1, (5, 11)) for name in ("scale", "soft cap")),  # one product is no sum
        *((name, 2, (5, 11)) for name in ("scale", "alibi", "bias")),
    ],
)
def test_huge_logits_pick_the_largest(name, H, blocks):
    options = HUGE[name]
    q, k = np.ones((5, 1, H), np.float32), np.zeros((11, 1, H), np.float32)
    k[:, 0, 0] = np.arange(11)
    v = np.eye(11, dtype=np.float32)[:, None]
    out, lse = flash_attention_with_lse(q, k, v, **options, block_sizes=blocks)
    exact = attention(q, k, v, **options)
    np.testing.assert_array_equal(out, exact[0])
    np.testing.assert_allclose(lse, exact[1], rtol=1e-6)
