"""A cache, after any schedule of calls, holds the tokens that a list of them would hold."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from cache_oracle import Rows
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from oracle import attention

from flash_jax import KVCache, attend, attend_with_lse

B, K, G, H, Hv = 2, 2, 2, 5, 3
N = K * G
SLOTS = 13
KINDS = {
    "float32": {},
    "window": {"window": 5},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int8 window": {"dtype": "int8", "window": 4},
}
# Of the results, relative to the largest: few queries, and many, which are rounded to 8 bits with
# keys of 8 bits. The oracle's tokens are those that are stored.
ROUNDING = {"float32": (3e-6, 3e-6), "bfloat16": (1e-2, 1e-2), "int8": (3e-4, 3e-2)}
append = jax.jit(KVCache.append, static_argnames="left_padded")
with_lse = jax.jit(attend_with_lse)


def empty(kind="float32", slots=SLOTS, garbage=False, rows=B):
    cache = KVCache.empty(rows, slots, K, H, value_dim=Hv, **KINDS[kind])
    if not garbage:
        return cache
    names = ["keys", "values"] if cache.key_scales is None else ["key_scales"]
    full = {name: jnp.full_like(getattr(cache, name), jnp.nan) for name in names}
    return dataclasses.replace(cache, **full)


def tokens(rng, T, rows=B):
    shapes = (rows, T, K, H), (rows, T, K, Hv), (rows, T, N, H)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def both(kind, garbage=False, slots=SLOTS):
    cache = empty(kind, slots, garbage)
    return cache, Rows(B, slots, Hv, cache.window)


def stored(x, kind):
    """Tokens as a cache of that kind holds them."""
    dtype = KINDS[kind].get("dtype", "float32")
    if dtype != "int8":
        return x.astype(dtype).astype(np.float32)
    scale = np.max(np.abs(x), axis=-1, keepdims=True) / np.float32(127)
    return np.round(x / scale) * scale


def rounding(cache, T=1):
    return ROUNDING[str(cache.keys.dtype)][T > 16]


def grow(cache, rows, kind, key, value, lengths, left_padded=False):
    cache = append(cache, key, value, np.array(lengths), left_padded=left_padded)
    rows.append(stored(key, kind), stored(value, kind), lengths, left_padded)
    return cache


def assert_agrees(cache, rows, query, **options):
    exact = rows.attend(query, **options)
    assert cache.lengths.tolist() == rows.lengths
    for x, right in zip(with_lse(query, cache, **options), exact, strict=True):
        size = np.nanmax(np.abs(right[~np.isinf(right)]), initial=1)
        tolerance = size * rounding(cache, query.shape[1])
        np.testing.assert_allclose(x, right, atol=tolerance, rtol=0)


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
    out = attend(query, cache, **options)
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


def test_an_overflow_is_an_error_where_it_is_known(rng):
    key, value, query = tokens(rng, 7)
    cache = empty().append(key, value)
    with pytest.raises(ValueError, match="slots for all tokens; it has 13"):
        cache.append(key, value)
    over = append(cache, key, value, np.array([7, 6]))
    assert over.lengths.tolist() == [14, 13]
    with pytest.raises(ValueError, match=r"in rows \[0\] it does not: it has 13 slots"):
        attend(query, over)
    out, lse = with_lse(query, over)
    assert np.isnan(out[0, -1]).all()
    assert np.isnan(lse[0, :, -1]).all()
    assert np.isfinite(out[0, :-1]).all()
    assert np.isfinite(out[1]).all()
    again = over.truncate(13)
    np.testing.assert_array_equal(again.to_arrays().key[0, 7:], key[0, :6])


def test_a_ring_that_has_moved_on_is_an_error_where_it_is_known(rng):
    key, value, query = tokens(rng, 12)
    cache = empty("window").append(key, value).append(key, value)
    with pytest.raises(ValueError, match="must hold all tokens that the queries read"):
        attend(query, cache)
    # The slots are 13, and each query reads 5: those of the last 9 are all there.
    assert np.isfinite(attend(query[:, -9:], cache, query_offset=15)).all()


@pytest.mark.parametrize("kind", ["float32", "window", "int8"])
def test_to_arrays_are_the_tokens_in_order(kind, rng):
    cache, rows = both(kind)
    for T in (7, 6, *([2] * 3 if kind == "window" else [])):
        key, value, _ = tokens(rng, T)
        cache = grow(cache, rows, kind, key, value, (T, T - 1))
    key, value, first = cache.to_arrays()
    for b in range(B):
        held = rows.rows[b][max(0, len(rows.rows[b]) - SLOTS) :]
        assert first[b] == len(rows.rows[b]) - len(held)
        for x, right in zip((key[b], value[b]), zip(*held, strict=True), strict=True):
            np.testing.assert_allclose(x[: len(held)], np.stack(right), atol=1e-6)
            assert not np.any(x[len(held) :])


@pytest.mark.parametrize(
    ("kind", "loop"),
    [("float32", "donation"), ("float32", "scan"), ("int8", "while_loop"), ("window", "scan")],
)
def test_tokens_are_appended_in_place(kind, loop, rng):
    """Nothing in the program copies the cache, or makes another array of its size."""
    cache = KVCache.empty(B, 4999, K, 64, **KINDS[kind])
    key, query = (rng.standard_normal((B, 1, n, 64)).astype(np.float32) for n in (K, N))

    def step(cache, query):
        cache = cache.append(key, key)
        return cache, attend(query, cache)

    def run(cache, query):
        if loop == "donation":
            return step(cache, query)
        if loop == "scan":
            return jax.lax.scan(lambda cache, _: step(cache, query), cache, length=5)
        going = lambda carry: carry[0].lengths[0] < 5  # noqa: E731
        return jax.lax.while_loop(going, lambda carry: step(*carry), (cache, query))

    compiled = jax.jit(run, donate_argnums=0).lower(cache, query).compile()
    for line in compiled.as_text().splitlines():
        assert f"{B},{K},4999,64]" not in line.split(" copy")[0] or " copy" not in line, line
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes


def reference(query, key, value, mask):
    """jax.nn has one head size only."""
    value = jnp.pad(value, [(0, 0)] * 3 + [(0, H - Hv)])
    return jax.nn.dot_product_attention(query, key, value, mask=mask)[..., :Hv]


@pytest.mark.parametrize("T", [2, 18])
def test_gradients_are_those_of_attention(T, rng):
    old, (key, value, query) = tokens(rng, 4)[:2], tokens(rng, T)
    weights = rng.standard_normal((B, T, N, Hv)).astype(np.float32)
    cache = append(empty(slots=31, garbage=True), *old)

    def of_cache(query, key, value):
        return jnp.sum(weights * attend(query, append(cache, key, value)))

    def plain(query, key, value):
        k, v = (jnp.concatenate(x, axis=1) for x in zip(old, (key, value), strict=True))
        mask = jnp.tri(T, T + 4, 4, dtype=bool)
        return jnp.sum(weights * reference(query, k, v, mask))

    mine, theirs = (jax.jit(jax.grad(f, (0, 1, 2)))(query, key, value) for f in (of_cache, plain))
    for x, right in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(x, right, atol=1e-5)


def test_forward_mode_is_that_of_attention(rng):
    (key, value, query), cache = tokens(rng, 2), empty()
    moving = (query, key, value), (key.repeat(G, 2), query[:, :, :K], value**2)

    def of_cache(query, key, value):
        return attend(query, append(cache, key, value))

    def plain(query, key, value):
        return reference(query, key, value, jnp.tri(2, dtype=bool))

    mine, theirs = (jax.jit(functools.partial(jax.jvp, f))(*moving)[1] for f in (of_cache, plain))
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_a_cache_of_int8_has_the_gradients_of_its_numbers(rng):
    key, value, query = tokens(rng, 3)
    cache = empty("int8").append(key, value)
    k, v, _ = cache.to_arrays()
    floats = empty().append(k[:, :3], v[:, :3])
    mine, theirs = (
        jax.grad(lambda q, c=c: jnp.sum(attend(q, c) ** 2))(query) for c in (cache, floats)
    )
    np.testing.assert_allclose(mine, theirs, atol=2e-3)


@pytest.mark.parametrize("kind", ["int8 window"])
def test_vmap_is_the_loop_over_caches(kind, rng):
    caches, queries = [], []
    for lengths in ((3, 2), (1, 3)):
        key, value, query = tokens(rng, 3)
        caches.append(append(empty(kind), key, value, np.array(lengths)))
        queries.append(query)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    key, value, query = tokens(rng, 3)

    def step(cache, query):
        cache = cache.append(key, value)
        return attend_with_lse(query, cache), cache.to_arrays()

    mine = jax.jit(jax.vmap(step))(stacked, np.stack(queries))
    each = [jax.jit(step)(*x) for x in zip(caches, queries, strict=True)]
    for x, *right in zip(*map(jax.tree.leaves, (mine, *each)), strict=True):
        np.testing.assert_allclose(x, np.stack(right), atol=1e-6)


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
        mine, exact = (
            attend_with_lse(query, cache, **chosen, prefix=prefix),
            rows.attend(query, **chosen),
        )
        real = np.array([[t < k for t in range(T)] for k in n])
        np.testing.assert_allclose(mine[0][real], exact[0][real], atol=3e-6)
        np.testing.assert_allclose(
            np.swapaxes(mine[1], 1, 2)[real], np.swapaxes(exact[1], 1, 2)[real], atol=3e-6
        )
        assert not np.any(mine[0][~real])


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


def test_what_is_stored_in_8_bits_stays_as_it_is(rng):
    """A scale per token and head: no later token changes what is stored."""
    key, value, _ = tokens(rng, 5)
    cache = empty("int8").append(key, value)
    later = cache.append(100 * key, 100 * value)
    for x, y in zip(cache.to_arrays()[:2], later.to_arrays()[:2], strict=True):
        np.testing.assert_array_equal(x[:, :5], y[:, :5])
    for x, y in zip(cache.to_arrays()[:2], (key, value), strict=True):
        half = np.max(np.abs(y), axis=-1, keepdims=True) / 254
        assert np.all(np.abs(x[:, :5] - y) <= half * 1.001)


REFUSED = {
    "length must be > 0": lambda cache, x: KVCache.empty(1, 0, 1, 1),
    "window must be at most length, 4": lambda cache, x: KVCache.empty(1, 4, 1, 1, window=5),
    "dtype must be one of float32": lambda cache, x: KVCache.empty(1, 4, 1, 1, dtype="int4"),
    r"key must be \(B, T, K, H\) of the cache": lambda cache, x: cache.append(x[..., 1:], x),
    r"value must be \(B, T of key, K, Hv\)": lambda cache, x: cache.append(x, x),
    r"lengths must be in 0..3": lambda cache, x: cache.append(x, x[..., :Hv], [4, 0]),
    r"query must be \(B, T, N, H\) of the cache": lambda cache, x: attend(x[..., 1:], cache),
    "query heads must be a multiple of cache heads": lambda cache, x: attend(x[:, :, :1], cache),
    r"rows must be in 0..1": lambda cache, x: cache.reorder([0, 2]),
    "prefix must have no window": lambda cache, x: attend(x, cache, prefix=empty("window")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_errors_name_the_argument(message, rng):
    with pytest.raises(ValueError, match=message):
        REFUSED[message](empty(), tokens(rng, 3)[0])


def test_kinds_that_are_refused(rng):
    key, value, query = tokens(rng, 3)
    cache = empty("window").append(key, value)
    with pytest.raises(NotImplementedError, match="bias must be None where the cache has a window"):
        attend(query, cache, np.zeros((1, 1, 3, SLOTS), np.float32))
    with pytest.raises(TypeError, match="cache must be a KVCache or PagedKVCache; it is list"):
        attend(query, [])
    with pytest.raises(TypeError, match="rows must be bools or integers"):
        cache.reset(0.5)


def test_results_are_the_same_outside_jit(rng):
    key, value, query = tokens(rng, 3)
    cache = empty().append(key, value)
    np.testing.assert_allclose(attend(query, cache), with_lse(query, cache)[0], atol=1e-6)
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize("kind", ["float32", "int8 window"])
def test_strict_modes_of_jax(kind, rng):
    key, value, query = tokens(rng, 3)
    slopes = np.ones(N, np.float32)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
    ):
        cache = empty(kind).append(key, value, [3, 2])
        cache = cache.reorder([1, 0]).truncate(2).reset([1])
        assert np.isfinite(attend(query, cache.append(key, value), alibi_slopes=slopes)).all()
        assert cache.to_arrays().key.shape == (B, SLOTS, K, H)
