"""The promises of flash_attention, flash_attention_with_lse and merge_attention."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import numpy as jnp
from options import (
    MASKING,
    OPTIONS,
    TILES,
    B,
    Hv,
    K,
    N,
    S,
    T,
    by_name,
    everything,
    int32,
    masking_bias,
    named,
    random_inputs,
    random_mask,
    segments,
)
from oracle import (
    assert_within_bound,
    attention,
    error_bound,
    finite_error,
    kept_pairs,
)

from flash_jax import (
    BlockSizes,
    CausalMask,
    LengthMask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
    dot_product_attention,
    flash_attention,
    flash_attention_with_lse,
    merge_attention,
)

# --- Agreement with the oracle


@by_name(OPTIONS)
def test_every_option_agrees_with_the_oracle(options, rng):
    inputs, options = random_inputs(rng), options(rng)
    exact = attention(*inputs, **options)
    plain = attention(*inputs, dtype=np.float32, **options)
    results = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    assert_within_bound(results, exact, plain, np.float32)
    np.testing.assert_array_equal(
        results[0], flash_attention(*inputs, **options, block_sizes=TILES)
    )


@named("none", "bias of -inf", "causal window", "segments", "everything")
@pytest.mark.parametrize("blocks", [(8, 16), None])
def test_tiles_of_any_size_agree_with_the_oracle(options, blocks, rng):
    inputs, options = random_inputs(rng), options(rng)
    exact, plain = (attention(*inputs, **options, dtype=dtype) for dtype in (None, np.float32))
    results = flash_attention_with_lse(*inputs, **options, block_sizes=blocks)
    assert_within_bound(results, exact, plain, np.float32)


@named("none", "bias", "scale", "soft cap", "everything")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_with_16_bits_lse_is_as_accurate_as_float32(options, dtype, rng):
    inputs, options = random_inputs(rng, dtype=dtype), options(rng)
    exact, plain = attention(*inputs, **options), attention(*inputs, dtype=dtype, **options)
    results = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    assert_within_bound(results, exact, plain, dtype)


@named("none", "soft cap", "everything")
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
    for blocks in (None, (64, 48), (300, 300)):
        results = flash_attention_with_lse(*inputs, **options, block_sizes=blocks)
        assert_within_bound(results, exact, plain, np.float32)


def test_a_call_without_batch_is_a_batch_of_one(rng):
    inputs, options = random_inputs(rng, B=1), everything(rng)
    batched = {
        name: x[:1] if np.ndim(x) in (1, 2, 4) and name not in ("sinks", "alibi_slopes") else x
        for name, x in options.items()
        if name != "local_window_size"
    }
    single = {
        name: x[0] if np.ndim(x) in (1, 2) and name not in ("sinks", "alibi_slopes") else x
        for name, x in batched.items()
    }
    window = {"local_window_size": options["local_window_size"]}
    expected = flash_attention_with_lse(*inputs, **batched, **window, block_sizes=TILES)
    results = flash_attention_with_lse(
        *(x[0] for x in inputs), **single, **window, block_sizes=TILES
    )
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_array_equal(x, y[0])
    exact = attention(*inputs, **batched, **window)
    plain = attention(*inputs, **batched, **window, dtype=np.float32)
    assert_within_bound(expected, exact, plain, np.float32)


def test_grouped_heads_are_repeated_keys_and_values(rng):
    q, k, v = random_inputs(rng)
    options = everything(rng)
    repeated = (np.repeat(x, N // K, axis=2) for x in (k, v))
    results = flash_attention_with_lse(q, k, v, **options, block_sizes=TILES)
    expected = flash_attention_with_lse(q, *repeated, **options, block_sizes=TILES)
    exact, plain = (attention(q, k, v, **options, dtype=dtype) for dtype in (None, np.float32))
    for x, y, right, near in zip(results, expected, exact, plain, strict=True):
        bound = error_bound(near, right, np.float32)
        assert finite_error(x, np.asarray(y, np.float64)) <= 2 * bound


def test_block_sizes_are_any_pair(rng):
    inputs = random_inputs(rng)
    first, *others = (
        flash_attention_with_lse(*inputs, is_causal=True, block_sizes=blocks)
        for blocks in ([5, 3], (5, 3), BlockSizes(5, 3), (np.int64(5), 3))
    )
    for other in others:
        for x, y in zip(first, other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("B", "T", "S"), [(2, 0, 5), (2, 5, 0), (0, 5, 7)])
@pytest.mark.parametrize("sinks", [None, np.arange(6, dtype=np.float32)])
def test_an_empty_axis_gives_empty_or_zero_outputs(B, T, S, sinks, rng):
    inputs = random_inputs(rng, B=B, T=T, S=S)
    out, lse = flash_attention_with_lse(*inputs, sinks=sinks, is_causal=True)
    np.testing.assert_array_equal(out, np.zeros((B, T, N, Hv)))
    nothing = np.full(N, -np.inf) if sinks is None else sinks
    np.testing.assert_array_equal(lse, np.broadcast_to(nothing[:, None], (B, N, T)))


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


# --- Random combinations

SHAPES = [(2, 7, 13, 6, 3), (1, 17, 11, 4, 1), (3, 5, 5, 2, 2)]  # B, T, S, N, K
bits = st.booleans()


@st.composite
def calls(draw):
    """Sizes, options that are compiled in, the names of the others, and a seed for their values."""
    static = {
        "is_causal": draw(bits),
        "local_window_size": draw(st.sampled_from([None, 3, (2, None), (None, 1), (4, 0)])),
        "block_sizes": draw(st.sampled_from([TILES, (8, 16), None])),
    }
    names = draw(st.sets(st.sampled_from(sorted(DRAWN))))
    return draw(st.sampled_from(SHAPES)), static, sorted(names), draw(st.integers(0, 2**32 - 1))


DRAWN = {
    "bias": lambda rng, B, T, S, N: {
        "bias": masking_bias(rng, *[(N, T, S), (B, 1, T, S), (T, S)][rng.integers(3)])
    },
    "mask": lambda rng, B, T, S, N: {
        "mask": random_mask(rng, *[(N, T, S), (B, 1, T, S), (T, S)][rng.integers(3)])
    },
    "scale": lambda rng, *_: {"scale": np.float32(rng.normal())},
    "soft cap": lambda rng, *_: {"logits_soft_cap": np.float32(rng.uniform(0.5, 9))},
    "sinks": lambda rng, B, T, S, N: {"sinks": rng.standard_normal(N).astype(np.float32)},
    "alibi": lambda rng, B, T, S, N: {"alibi_slopes": rng.random(N).astype(np.float32)},
    "offset": lambda rng, B, T, S, N: {
        "query_offset": rng.integers(-T, S + 3, [(), (B,)][rng.integers(2)], np.int32)
    },
    "lengths of queries": lambda rng, B, T, S, N: {
        "query_seq_lengths": rng.integers(0, T + 1, B, np.int32)
    },
    "lengths of keys": lambda rng, B, T, S, N: {
        "key_value_seq_lengths": rng.integers(0, S + 1, B, np.int32)
    },
    "segments": lambda rng, B, T, S, N: {
        "query_segment_ids": np.sort(rng.integers(0, 3, (B, T), np.int32)),
        "key_value_segment_ids": np.sort(rng.integers(0, 3, (B, S), np.int32)),
    },
}


@hypothesis.settings(derandomize=True, deadline=None, max_examples=16, database=None)
@hypothesis.given(calls())
def test_any_traced_options_together_agree_with_the_oracle(call):
    (B, T, S, N, K), static, names, seed = call
    rng = np.random.default_rng(seed)
    inputs = random_inputs(rng, B, T, S, N, K)
    traced = {}
    for name in names:
        traced |= DRAWN[name](rng, B, T, S, N)
    run = jax.jit(lambda inputs, traced: flash_attention_with_lse(*inputs, **traced, **static))
    results = run(inputs, traced)
    options = traced | {name: x for name, x in static.items() if name != "block_sizes"}
    exact, plain = (attention(*inputs, **options, dtype=dtype) for dtype in (None, np.float32))
    assert_within_bound(results, exact, plain, np.float32)


# --- What is masked cannot leak, what is visible shows


def causal_pairs(offset=0):
    return np.arange(S) <= np.arange(T)[:, None] + offset


def mask_objects(rng):
    """Masks, and the pairs that they keep."""
    ids = segments(rng)
    q_ids, kv_ids = ids.values()
    t, s = np.arange(T)[:, None], np.arange(S)
    offset = int32(5, -2)
    same = (q_ids[:, :, None] == kv_ids[:, None])[:, None]
    moved = t + offset[:, None, None, None]
    n = int32(4, 9)
    lengths = LengthMask(int32(3, T), int32(S, 8))
    within = (t < lengths.q[:, None, None, None]) & (s < lengths.kv[:, None, None, None])
    return {
        "causal": (CausalMask(6), causal_pairs(6)),
        "causal per element": (CausalMask(offset), s <= moved),
        "window": (WindowMask(2, 1, offset), (s >= moved - 2) & (s <= moved + 1)),
        "segments": (SegmentMask(q_ids, kv_ids), same),
        "segments of all": (SegmentMask(q_ids[0], kv_ids[0]), same[:1]),
        "lengths": (lengths, within),
        "prefix or causal": (
            PrefixMask(n) | CausalMask(),
            (s < n[:, None, None, None]) | causal_pairs(),
        ),
        "segments and causal": (SegmentMask(q_ids, kv_ids) & CausalMask(), same & causal_pairs()),
        "all of them": (
            (lengths & WindowMask(None, 3)) | (PrefixMask(n) & SegmentMask(q_ids, kv_ids)),
            (within & (s <= t + 3)) | ((s < n[:, None, None, None]) & same),
        ),
        "predicate": (
            PredicateMask(_diagonals),
            (t + s + np.arange(N)[:, None, None] + np.arange(B)[:, None, None, None]) % 3 != 0,
        ),
    }


def _diagonals(b, h, q_index, k_index):
    return (q_index + k_index + h + b) % 3 != 0


MASK_OBJECTS = list(mask_objects(np.random.default_rng(0)))


def masking_options(name, rng):
    """The options of a name in MASKING or MASK_OBJECTS, and the pairs (B, N, T, S) they keep."""
    if name in MASKING:
        options = MASKING[name](rng)
        return options, kept_pairs((B, N, T, S), **options)
    mask, pairs = mask_objects(rng)[name.removeprefix("Mask: ")]
    return {"mask": mask}, kept_pairs((B, N, T, S), mask=pairs)


ALL_MASKING = pytest.mark.parametrize("name", [*MASKING, *(f"Mask: {x}" for x in MASK_OBJECTS)])


@ALL_MASKING
def test_masks_agree_with_the_oracle_and_rows_without_keys_are_zero(name, rng):
    inputs = random_inputs(rng)
    options, kept = masking_options(name, rng)
    exact, plain = (
        attention(*inputs, options.get("bias"), kept, dtype=dtype) for dtype in (None, np.float32)
    )
    out, lse = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    assert_within_bound((out, lse), exact, plain, np.float32)
    empty = ~kept.any(axis=-1)
    assert not np.swapaxes(out, 1, 2)[empty].any()
    np.testing.assert_array_equal(np.isneginf(lse), empty)


@pytest.mark.parametrize("name", ["mask", "bias of -inf", "causal per element", "lengths"])
def test_rows_without_keys_are_zero_and_have_their_sink_as_lse(name, rng):
    inputs, sinks = random_inputs(rng), np.arange(N, dtype=np.float32) - 2.3
    options, kept = masking_options(name, rng)
    out, lse = flash_attention_with_lse(*inputs, **options, sinks=sinks, block_sizes=TILES)
    empty = ~kept.any(axis=-1)
    assert empty.any()
    assert not np.swapaxes(out, 1, 2)[empty].any()
    expected = np.broadcast_to(sinks[:, None], lse.shape)
    np.testing.assert_array_equal(np.asarray(lse)[empty], expected[empty])


@ALL_MASKING
def test_a_bad_key_or_value_shows_in_exactly_the_rows_that_read_it(name, rng):
    q, k, v = random_inputs(rng)
    options, kept = masking_options(name, rng)
    run = functools.partial(flash_attention_with_lse, q, **options, block_sizes=TILES)
    before = [np.asarray(x) for x in run(k, v)]
    for s in (0, 6, S - 1):
        bad = np.zeros((B, S, K), bool)
        bad[0, s, 1] = bad[1, s, 0] = True
        # (B, T, N): the row reads a bad key
        reads = (kept & np.repeat(bad, N // K, axis=2).transpose(0, 2, 1)[:, :, None]).any(-1)
        reads = reads.swapaxes(1, 2)
        for poison in (np.nan, np.inf, -np.inf, 1e30):
            worse_k, worse_v = k.copy(), v.copy()
            worse_k[bad], worse_v[bad, 1] = poison, poison
            out, lse = (np.asarray(x) for x in run(worse_k, v))
            np.testing.assert_array_equal(out[~reads], before[0][~reads])
            np.testing.assert_array_equal(
                lse.swapaxes(1, 2)[~reads], before[1].swapaxes(1, 2)[~reads]
            )
            if np.isnan(poison):
                assert np.isnan(out[reads]).all()
                assert np.isnan(lse.swapaxes(1, 2)[reads]).all()
            out, lse = (np.asarray(x) for x in run(k, worse_v))
            np.testing.assert_array_equal(out[~reads], before[0][~reads])
            np.testing.assert_array_equal(out[..., [0, 2]], before[0][..., [0, 2]])
            np.testing.assert_array_equal(lse, before[1])
            if poison != 1e30:
                np.testing.assert_array_equal(
                    out[reads][:, 1], np.full(reads.sum(), poison, np.float32)
                )


@pytest.mark.parametrize(
    "name",
    [
        "mask",
        "bias of -inf",
        "causal per element",
        "window",
        "lengths",
        "segments",
        "Mask: prefix or causal",
        "Mask: predicate",
    ],
)
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30, -np.inf])
def test_a_bias_behind_the_mask_changes_nothing(name, poison, rng):
    inputs = random_inputs(rng)
    options, kept = masking_options(name, rng)
    bias = np.broadcast_to(options.pop("bias", rng.standard_normal((S,))), kept.shape)
    bias = bias.astype(np.float32)
    if "bias" in name:  # there -inf is the mask itself, and a mask must be before the poison
        options["mask"] = kept
    run = functools.partial(flash_attention_with_lse, *inputs, **options, block_sizes=TILES)
    before, after = run(bias=bias), run(bias=np.where(kept, bias, np.float32(poison)))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_what_is_padding_changes_nothing(poison, rng):
    q, k, v = random_inputs(rng)
    q_lengths, kv_lengths = int32(7, 3), int32(5, 16)
    options = {"query_seq_lengths": q_lengths, "key_value_seq_lengths": kv_lengths}
    run = functools.partial(flash_attention_with_lse, **options, is_causal=True, query_offset=5)
    before = run(q, k, v, block_sizes=TILES)
    q[np.arange(T) >= q_lengths[:, None]] = poison
    for x in (k, v):
        x[np.arange(S) >= kv_lengths[:, None]] = poison
    for x, y in zip(before, run(q, k, v, block_sizes=TILES), strict=True):
        np.testing.assert_array_equal(x, y)


# --- Dropout


def dropout_factors(rng, rate, B=B, N=N, T=T, S=S, **options):
    """(B, N, T, S): with equal scores and value the identity, the output is the probabilities."""
    q, k = np.zeros((B, T, N, 1), np.float32), np.zeros((B, S, 1, 1), np.float32)
    v = np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None], (B, S, 1, S))
    out = flash_attention(q, k, v, dropout_rate=rate, dropout_rng=rng, **options)
    return np.asarray(out).swapaxes(1, 2) * S


def test_dropped_probabilities_are_the_same_for_all_tiles_and_under_jit(rng):
    q, k, _ = random_inputs(rng, T=23)
    v = np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None], (B, S, K, S))
    options = {"is_causal": True, "query_offset": 3}
    p = np.asarray(flash_attention(q, k, v, **options, block_sizes=TILES))
    dropped = []
    for blocks in [TILES, (8, 16), None]:
        run = functools.partial(flash_attention, **options, dropout_rate=0.25, block_sizes=blocks)
        out = np.asarray(run(q, k, v, dropout_rng=jax.random.key(7)))
        dropped.append((out == 0) & (p > 0))
        np.testing.assert_allclose(out, np.where(dropped[-1], 0, p / 0.75), rtol=2e-6, atol=1e-7)
    for other in dropped[1:]:
        np.testing.assert_array_equal(other, dropped[0])
    jitted = jax.jit(run)(q, k, v, dropout_rng=jax.random.key(7))
    np.testing.assert_array_equal(jitted, out)


@pytest.mark.parametrize(
    ("blocks", "dtype"), [(TILES, np.float32), (None, np.float32), (TILES, jnp.bfloat16)]
)
def test_dropout_with_everything_agrees_with_the_oracle_and_leaves_lse(blocks, dtype, rng):
    inputs, options = random_inputs(rng, dtype=dtype), everything(rng)
    key = jax.random.key(3)
    factors = np.where(dropout_factors(key, 0.4) > 0, 1 / 0.6, 0)
    exact, plain = (attention(*inputs, **options, dropout=factors, dtype=x) for x in (None, dtype))
    results = flash_attention_with_lse(
        *inputs, **options, dropout_rate=0.4, dropout_rng=key, block_sizes=blocks
    )
    assert_within_bound(results, exact, plain, dtype)


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_the_dropped_fraction_is_the_rate_and_differs_by_key_head_and_element(rate):
    sizes = {"B": 3, "N": 4, "T": 31, "S": 37}
    factors = dropout_factors(jax.random.key(0), rate, **sizes)
    dropped = factors == 0
    np.testing.assert_allclose(factors[~dropped], 1 / (1 - rate), rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate) / dropped.size)
    assert abs(dropped.mean() - rate) < 4 * deviation
    again, other = (dropout_factors(jax.random.key(i), rate, **sizes) for i in (0, 1))
    np.testing.assert_array_equal(factors, again)
    # Two independent sets differ in 2 rate (1 - rate) of their elements.
    share, deviation = 2 * rate * (1 - rate), np.sqrt(2 * rate * (1 - rate) / dropped[0].size)
    for a, b in [
        (dropped, other == 0),
        (dropped[0], dropped[1]),
        (dropped[:, 0], dropped[:, 1]),
        (dropped[:, :, :-1], dropped[:, :, 1:]),
        (dropped[..., :-1], dropped[..., 1:]),
    ]:
        assert abs((a != b).mean() - share) < 5 * deviation


def test_dropout_keeps_the_expectation(rng):
    q, k, v = random_inputs(rng, B=1, T=5, S=7, N=2, K=1)
    keys = jax.random.split(jax.random.key(1), 800)
    run = jax.vmap(lambda key: flash_attention(q, k, v, dropout_rate=0.3, dropout_rng=key))
    draws = np.asarray(run(keys), np.float64)
    error = draws.mean(axis=0) - attention(q, k, v)[0]
    assert (np.abs(error) < 5 * draws.std(axis=0) / np.sqrt(len(keys))).all()
    # Many calls share a step, one has its own: only rounding may tell.
    one = flash_attention(q, k, v, dropout_rate=0.3, dropout_rng=keys[3])
    np.testing.assert_allclose(draws[3], one, rtol=0, atol=1e-6)


def test_a_rate_of_zero_is_no_dropout(rng):
    inputs = random_inputs(rng)
    out = flash_attention(*inputs, dropout_rate=0.0, dropout_rng=jax.random.key(0))
    np.testing.assert_array_equal(out, flash_attention(*inputs))


def test_raw_and_typed_keys_draw_the_same():
    raw, typed = jax.random.PRNGKey(5), jax.random.key(5)
    np.testing.assert_array_equal(dropout_factors(raw, 0.5), dropout_factors(typed, 0.5))


def test_under_vmap_with_a_shared_key_every_call_draws_the_same(rng):
    """The element is counted within a call: a batch of a call differs, a vmap of calls does not."""
    q, k, v = (np.repeat(x, 3, axis=0) for x in random_inputs(rng, B=1))
    run = functools.partial(flash_attention, dropout_rate=0.5, dropout_rng=jax.random.key(2))
    batch, calls = run(q, k, v), jax.vmap(run)(q, k, v)
    for i in range(3):
        np.testing.assert_array_equal(calls[i], run(q[i], k[i], v[i]))
        np.testing.assert_array_equal(calls[i], batch[0])
    assert not np.array_equal(batch[0], batch[1])


# --- Merging


@pytest.mark.parametrize(
    ("cuts", "dtype"), [((6,), np.float32), ((4, 9), np.float32), ((6,), jnp.bfloat16)]
)
def test_merged_parts_of_the_keys_are_the_whole(cuts, dtype, rng):
    q, k, v = random_inputs(rng, dtype=dtype)
    options = everything(rng)
    options["mask"][:, :, 3] = False
    results = []
    for start, stop in zip((0, *cuts), (*cuts, S), strict=True):
        part = slice(start, stop)
        results.append(
            flash_attention_with_lse(
                q,
                k[:, part],
                v[:, part],
                **options
                | {
                    "bias": options["bias"][..., part],
                    "mask": options["mask"][..., part],
                    "key_value_seq_lengths": np.maximum(
                        0, options["key_value_seq_lengths"] - start
                    ),
                    "key_value_segment_ids": options["key_value_segment_ids"][:, part],
                    "query_offset": options["query_offset"] - np.int32(start),
                    "sinks": options["sinks"] if stop == S else None,
                },
                block_sizes=TILES,
            )
        )
    exact, plain = (attention(q, k, v, **options, dtype=x) for x in (None, dtype))
    assert_merged(results, exact, plain, dtype)


def test_merging_keeps_rows_that_no_part_reads(rng):
    q, k, v = random_inputs(rng)
    options = {"is_causal": True, "query_offset": -4}
    results = [
        flash_attention_with_lse(q, k[:, a:b], v[:, a:b], is_causal=True, query_offset=-4 - a)
        for a, b in ((0, 3), (3, 8), (8, S))
    ]
    exact, plain = (attention(q, k, v, **options, dtype=dtype) for dtype in (None, np.float32))
    assert np.isneginf(exact[1][..., :4]).all()
    assert_merged(results, exact, plain, np.float32)
    assert_merged(results[::-1], exact, plain, np.float32)


def assert_merged(results, exact, plain, dtype):
    """The bound of one call, and once more the eps of every part."""
    merged = merge_attention(*zip(*results, strict=True))
    for x, right, near, kind in zip(merged, exact, plain, (dtype, np.float32), strict=True):
        assert x.dtype == kind
        error, bound = finite_error(x, right), error_bound(near, right, kind)
        assert error <= bound + len(results) * float(jnp.finfo(kind).eps)


# --- One program, whatever calls it


@named("none", "scale", "soft cap", "alibi", "everything")
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


def test_strict_modes_of_jax(rng):
    inputs, options = random_inputs(rng), everything(rng)
    options |= {"dropout_rate": 0.2, "dropout_rng": jax.random.key(0), "block_sizes": (4, 7)}
    shared = {
        name: options[name]
        for name in ("mask", "is_causal", "query_seq_lengths", "key_value_seq_lengths")
    }

    def results():
        parts = [flash_attention_with_lse(*inputs, **options)] * 2
        return [
            *merge_attention(*zip(*parts, strict=True)),
            *dot_product_attention(*inputs, **shared, local_window_size=3, return_residual=True),
        ]

    expected = results()
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
    ):
        for x, y in zip(results(), expected, strict=True):
            np.testing.assert_array_equal(x, y)


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


@pytest.mark.parametrize(("H", "blocks"), [(1, (5, 11)), (2, (5, 11)), (2, (2, 3))])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1.37e10},
        {"scale": 1.37e10, "logits_soft_cap": 7.3e10},
        {"bias": 1.37e10 * np.arange(11, dtype=np.float32)},
        {"alibi_slopes": np.full(1, 1.37e10, np.float32), "query_offset": 10},
    ],
    ids=", ".join,
)
def test_huge_logits_pick_the_largest(options, H, blocks):
    q, k = np.ones((5, 1, H), np.float32), np.zeros((11, 1, H), np.float32)
    k[:, 0, 0] = np.arange(11)
    v = np.eye(11, dtype=np.float32)[:, None]
    out, lse = flash_attention_with_lse(q, k, v, **options, block_sizes=blocks)
    exact = attention(q, k, v, **options)
    np.testing.assert_array_equal(out, exact[0])
    np.testing.assert_allclose(lse, exact[1], rtol=1e-6)
