"""A cache, after any schedule of calls, is read as a list of its tokens would be."""

import dataclasses

import jax
import numpy as np
import pytest
from cache_oracle import Rows
from caches import (
    KINDS,
    B,
    G,
    Hv,
    N,
    append,
    assert_agrees,
    both,
    empty,
    grow,
    rounding,
    tokens,
    with_lse,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from oracle import attention

from flash_jax import KVCache, attend, attend_with_lse

counts = st.tuples(*[st.integers(0, 3)] * B)
calls = st.one_of(
    st.tuples(st.just("append"), counts, st.booleans()),
    st.tuples(st.just("one"), st.tuples(*[st.integers(0, 1)] * B)),
    st.tuples(st.just("truncate"), st.tuples(*[st.integers(0, 14)] * B)),
    st.tuples(st.just("reorder"), st.tuples(*[st.integers(0, B - 1)] * B)),
    st.tuples(st.just("reset"), st.tuples(*[st.booleans()] * B)),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(calls, min_size=4, max_size=14), st.booleans(), st.integers(0, 9))
def test_any_schedule_of_calls(kind, schedule, garbage, seed):
    rng = np.random.default_rng(seed)
    cache, rows = both(kind, garbage)
    for name, values, *others in schedule:
        if name in ("append", "one"):
            T = 3 if name == "append" else 1
            key, value, query = tokens(rng, T)
            left = bool(others and others[0])
            cache = grow(cache, rows, kind, key, value, values, left)
            assert_agrees(cache, rows, query)
        elif name == "truncate":
            cache = cache.truncate(np.array(values))
            rows.truncate(values)
        elif name == "reorder":
            cache = cache.reorder(np.array(values))
            rows.reorder(values)
        else:
            cache = cache.reset(np.array(values))
            rows.truncate([0 if gone else n for gone, n in zip(values, rows.lengths, strict=True)])
    assert cache.lengths.tolist() == rows.lengths


@pytest.mark.parametrize("kind", ["float32", "window", "int8"])
def test_the_chunks_of_a_prompt(kind, rng):
    """More queries than are read in place: through tiles, against what is there already."""
    cache, rows = both(kind, garbage=True, slots=61)
    for T, lengths in ((23, (23, 9)), (23, (20, 23)), (1, (1, 1))):
        key, value, query = tokens(rng, T)
        cache = grow(cache, rows, kind, key, value, lengths)
        assert_agrees(cache, rows, query)


@pytest.mark.parametrize(
    ("kind", "T"), [("float32", 3), ("window", 3), ("window", 19), ("int8 window", 3)]
)
def test_options_mean_what_they_mean_elsewhere(kind, T, rng):
    cache, rows = both(kind, slots=41)
    options = {
        "scale": 0.7,
        "logits_soft_cap": 2.5,
        "alibi_slopes": np.linspace(0.1, 0.9, N, dtype=np.float32),
        "sinks": rng.standard_normal(N).astype(np.float32),
        "local_window_size": (2, 0),
    }
    for lengths in ((T, T - 1), (T - 2, T)):
        key, value, query = tokens(rng, T)
        cache = grow(cache, rows, kind, key, value, lengths)
    out = np.asarray(attend(query, cache, **options))
    exact, _ = rows.attend(query, **options)
    padding = np.array([[t >= n for t in range(T)] for n in lengths])
    assert not np.any(out[padding])
    np.testing.assert_allclose(out[~padding], exact[~padding], atol=rounding(cache, T))


@pytest.mark.parametrize("T", [2, 18])
def test_bias_and_mask_meet_the_slots(T, rng):
    cache, rows = both("float32", slots=29)
    for t in (7, T):
        key, value, query = tokens(rng, t)
        cache = append(cache, key, value)
        rows.append(key, value, (t, t))
    bias = rng.standard_normal((B, N, T, 29)).astype(np.float32)
    mask = rng.random((B, 1, T, 29)) < 0.7
    L = 7 + T
    out, _ = rows.attend(query)
    for b in range(B):
        rows_b = Rows(1, 29, Hv)
        rows_b.rows, rows_b.last = [rows.rows[b]], [rows.last[b]]
        part = {"bias": bias[b : b + 1, ..., :L], "mask": mask[b : b + 1, ..., :L]}
        out[b] = rows_b.attend(query[b : b + 1], **part)[0][0]
    np.testing.assert_allclose(attend(query, cache, bias, mask), out, atol=3e-6)


@pytest.mark.parametrize("T", [1, 18])
def test_what_no_query_reads_changes_nothing_and_a_visible_nan_shows(T, rng):
    key, value, query = tokens(rng, T)
    later = [x.copy() for x in (key, value)]
    for x in later:
        x[1, -1] = np.nan
    cache = empty(slots=40).append(*tokens(rng, 7)[:2])
    hidden = cache.append(*later).truncate(7).append(key, value)
    np.testing.assert_array_equal(attend(query, hidden), attend(query, cache.append(key, value)))
    out = np.asarray(attend(query, cache.append(*later)))
    assert np.isnan(out[1, -1]).all()
    assert np.isfinite(out[0]).all()
    assert np.isfinite(out[1, :-1]).all()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_of_a_long_cache_the_filled_part_is_read(kind, rng):
    """Where that is little: tile by tile, and with the same result."""
    cache, rows = both(kind, slots=5000)
    last = jax.jit(lambda query, cache: attend(query, cache, query_offset=cache.lengths - 2))
    for _ in range(4):
        key, value, query = tokens(rng, 1201)
        cache = grow(cache, rows, kind, key, value, (1201, 1101))
        rows.last = [(2, 0)] * B
        exact, _ = rows.attend(query[:, :2])
        np.testing.assert_allclose(last(query[:, :2], cache), exact, atol=rounding(cache))


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_several_queries_of_a_long_cache_come_in_steps(kind, rng):
    """So the scores that are there at once, which make all temporaries, do not grow with them."""
    T, slots = 13, 61001
    cache, rows = both(kind, slots=slots)
    for n in (slots - T, T):
        key, value, query = tokens(rng, n)
        cache = grow(cache, rows, kind, key, value, (n, n))
    assert_agrees(cache, rows, query)
    program = with_lse.lower(query, cache).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**25
    if kind == "float32":  # a NaN of token 9 shows from query 9 on, in the rows of its head alone
        out = np.array(attend(query, cache))
        values = cache.values.at[0, 1, slots - T + 9].set(jnp.nan)
        worse = attend(query, dataclasses.replace(cache, values=values))
        out[0, 9:, G:] = np.nan
        np.testing.assert_allclose(worse, out, atol=1e-6)


@pytest.mark.parametrize(("shared", "T"), [(True, 2), (False, 18)])
def test_a_prefix_comes_before_all_tokens(shared, T, rng):
    rows_of_prefix = 1 if shared else B
    k, v, _ = tokens(rng, 9, rows_of_prefix)
    lengths = np.array([7] if shared else [7, 9])
    prefix = empty(slots=11, rows=rows_of_prefix).append(k, v, lengths)
    cache, rows = empty(slots=31), Rows(B, 31, Hv)
    k, v = (np.broadcast_to(x, (B, *x.shape[1:])) for x in (k, v))
    rows.append(k, v, np.broadcast_to(lengths, B))
    for n in ((3, 1), (T, T - 1)):
        key, value, query = tokens(rng, max(n))
        cache = cache.append(key, value, np.array(n))
        rows.append(key, value, n)
    options = {
        "alibi_slopes": np.linspace(0.1, 1, N, dtype=np.float32),
        "sinks": np.ones(N, np.float32),
        "local_window_size": (8, 0),
    }
    for chosen in ({}, options):
        mine = map(np.asarray, attend_with_lse(query, cache, **chosen, prefix=prefix))
        (out, lse), (right, right_lse) = mine, rows.attend(query, **chosen)
        real = np.array([[t < k for t in range(T)] for k in n])
        np.testing.assert_allclose(out[real], right[real], atol=3e-6)
        lse, right_lse = (np.swapaxes(x, 1, 2)[real] for x in (lse, right_lse))
        np.testing.assert_allclose(lse, right_lse, atol=3e-6)
        assert not np.any(out[~real])


def test_the_window_of_a_cache_ends_within_its_prefix(rng):
    k, v, _ = tokens(rng, 6)
    prefix, (cache, rows) = empty().append(k, v), both("window", slots=31)
    rows.append(k, v, (6, 6))
    for T in (1, 3):
        key, value, query = tokens(rng, T)
        cache = grow(cache, rows, "window", key, value, (T, T))
    exact, _ = rows.attend(query)
    np.testing.assert_allclose(attend(query, cache, prefix=prefix), exact, atol=3e-6)


def test_without_causality_all_tokens_are_read(rng):
    key, value, _ = tokens(rng, 9)
    cache, query = empty().append(key, value, [9, 4]), tokens(rng, 4)[2]
    exact, _ = attention(query, key, value, key_value_seq_lengths=[9, 4])
    np.testing.assert_allclose(attend(query, cache, is_causal=False), exact, atol=3e-6)


def test_many_small_probabilities_of_int8_are_not_cut_off(rng):
    """One key has weight 1; all others have some 0.1 together, each at most 4 steps of 16 bits."""
    S = 4099
    key = np.zeros((1, S, 1, 2), np.float32)
    key[0, 1:, 0, 0] = np.log(rng.uniform(0.01, 4, S - 1) / 65535)
    value = np.ones((1, S, 1, 1), np.float32)
    cache = KVCache.empty(1, S, 1, 2, value_dim=1, dtype="int8").append(key, value)
    query = np.array([1, 0], np.float32).reshape(1, 1, 1, 2)
    out = attend(query, cache, scale=1.0, query_offset=S - 1)
    np.testing.assert_allclose(out, 1, rtol=2e-3)
