"""A cache in pages holds what a list of tokens would, and takes no page that it does not need."""

import functools

import jax
import numpy as np
import pytest
from cache_oracle import Rows
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from flash_jax import KVCache, PagedKVCache, attend, attend_with_lse
from flash_jax._passes.operands import tile_in_pages
from flash_jax._tiles.axis import Axis
from flash_jax._tiles.tile import QueryTile

B, K, N, H, Hv = 3, 2, 4, 5, 3
P, M = 4, 6
append = jax.jit(PagedKVCache.append, static_argnames="left_padded")
with_lse = jax.jit(attend_with_lse)


def empty(pages=9, dtype="float32"):
    cache = PagedKVCache.empty(B, P * M, K, H, value_dim=Hv, pages=pages, page_size=P, dtype=dtype)
    return cache, Rows(B, P * M, Hv)


def tokens(rng, T):
    shapes = (B, T, K, H), (B, T, K, Hv), (B, T, N, H)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def assert_agrees(cache, rows, query, atol=3e-6):
    for x, right in zip(with_lse(query, cache), rows.attend(query), strict=True):
        np.testing.assert_allclose(x, right, atol=atol)


def assert_pages_are_those_of_the_tokens(cache, rows):
    table = np.asarray(cache.table)
    assert [(row >= 0).sum() for row in table] == [-(-n // P) for n in rows.lengths]
    assert cache.free_pages == cache.keys.shape[0] - len(set(table[table >= 0].tolist()))


three = lambda *values: st.tuples(*[st.integers(*values)] * B)  # noqa: E731
calls = st.one_of(
    st.tuples(st.just("append"), three(0, 3), st.booleans()),
    st.tuples(st.just("append"), three(0, 3), st.booleans()),
    st.tuples(st.just("truncate"), three(0, 14)),
    st.tuples(st.just("reorder"), three(0, B - 1)),
    st.tuples(st.just("reset"), st.tuples(*[st.booleans()] * B)),
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(calls, min_size=4, max_size=9), st.integers(0, 9))
def test_any_schedule_of_calls(schedule, seed):
    rng = np.random.default_rng(seed)
    cache, rows = empty(pages=B * M + 1)
    for name, values, *others in schedule:
        if name == "append":
            # Its rows have room: nine calls of three tokens are too many for one row only.
            values = [min(n, P * M - L) for n, L in zip(values, rows.lengths, strict=True)]
            key, value, query = tokens(rng, 3)
            cache = append(cache, key, value, np.array(values), left_padded=others[0])
            rows.append(key, value, values, others[0])
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
        assert_pages_are_those_of_the_tokens(cache, rows)


def test_a_prompt_in_chunks_and_a_token(rng):
    dtype = "bfloat16"
    cache, rows = empty(pages=18, dtype=dtype)
    for T, lengths in ((19, (19, 3, 11)), (1, (1, 1, 1)), (1, (1, 0, 1))):
        key, value, query = tokens(rng, T)
        cache = append(cache, key, value, np.array(lengths))
        rows.append(*(x.astype(dtype).astype(np.float32) for x in (key, value)), lengths)
        assert_agrees(cache, rows, query, 2e-2)
    key, value, _ = cache.to_arrays()
    for b, row in enumerate(rows.rows):
        for x, right in zip((key, value), zip(*row, strict=True), strict=True):
            np.testing.assert_array_equal(x[b, : len(row)].astype(np.float32), np.stack(right))
            assert not np.any(x[b, len(row) :])


def test_a_shared_prefix_takes_its_pages_once(rng):
    cache, rows = empty()
    key, value, _ = tokens(rng, 6)
    cache = append(cache, key, value, np.array([6, 0, 0])).reorder([0, 0, 0])
    rows.append(key, value, (6, 0, 0))
    rows.reorder([0, 0, 0])
    assert cache.free_pages == 7
    key, value, query = tokens(rng, 1)
    cache = append(cache, key, value)
    rows.append(key, value, (1, 1, 1))
    # The full page is shared, and the other one is everyone's own.
    assert np.unique(cache.table[:, 0]).size == 1
    assert np.unique(cache.table[:, 1]).size == B
    assert cache.free_pages == 5
    assert_agrees(cache, rows, query)


def test_a_token_without_a_page_is_an_error_where_it_is_known(rng):
    cache, _ = empty(pages=5)
    key, value, query = tokens(rng, 7)
    with pytest.raises(ValueError, match="must have pages for all tokens"):
        cache.append(key, value)
    full = append(cache, key, value)
    assert full.lengths.tolist() == [7, 7, 7]
    out, _ = with_lse(query, full)
    assert np.isfinite(out[:2]).all()
    assert np.isfinite(out[2, :4]).all()
    assert np.isnan(out[2, 4:]).all()
    with pytest.raises(ValueError, match=r"in rows \[2\] it does not"):
        attend(query, full)
    # What has no page does not come back with the next one that is free.
    key, value, query = tokens(rng, 1)
    again = append(full.reset([0]), key, value, np.array([0, 0, 1]))
    assert np.isnan(with_lse(query, again)[0][2]).all()


def test_pages_are_written_in_place(rng):
    cache = PagedKVCache.empty(B, 2048, K, 64, pages=1500, page_size=16)
    key, query = (rng.standard_normal((B, 1, n, 64)).astype(np.float32) for n in (K, N))

    def step(cache, _):
        cache = cache.append(key, key)
        return cache, attend(query, cache)

    run = jax.jit(lambda cache: jax.lax.scan(step, cache, length=5), donate_argnums=0)
    compiled = run.lower(cache).compile()
    for line in compiled.as_text().splitlines():
        assert " copy(" not in line or f"[1500,{K},16,64]" not in line.split(" copy(")[0], line
    # The values are mended in a copy of tiles, where they are not finite.
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes


@pytest.mark.parametrize("block_sizes", [None, (7, 8)])
def test_many_queries_read_pages_in_tiles(block_sizes, rng):
    """Key tiles of all, and of two pages."""
    cache, rows = empty(pages=18)
    for T, lengths in ((5, (5, 2, 4)), (19, (18, 17, 19))):
        key, value, query = tokens(rng, T)
        cache = append(cache, key, value, np.array(lengths))
        rows.append(key, value, lengths)
    run = jax.jit(functools.partial(attend_with_lse, block_sizes=block_sizes))
    for x, right in zip(run(query, cache), rows.attend(query), strict=True):
        np.testing.assert_allclose(x, right, atol=3e-6)


@pytest.mark.parametrize("size", [2, 8, 10, 24])
def test_a_tile_of_any_size_is_found_in_pages(size, rng):
    """Some heads of keys that are less than a page, whole pages, and parts of pages."""
    pool = rng.standard_normal((1, 9, 3, P, H)).astype(np.float32)
    table = np.array([[0, 1, 2, 3, 4, 5], [7, 0, 8, 2, 2, 5]], np.int32)
    rows = np.moveaxis(pool[0, table[1]], 1, 0).reshape(3, P * M, H)
    zero, one = np.int32(0), np.int32(1)
    kv = Axis.of(P * M, size)
    tile = QueryTile(Axis(1, 1), kv, one, 2, one, 2, one, 2, 1, zero)
    for j in range(kv.count):
        start = min(j * size, P * M - size)
        found = tile_in_pages(tile, jnp.asarray(pool), jnp.asarray(table), jnp.int32(j))
        np.testing.assert_array_equal(found, rows[1:, start : start + size])


def test_pages_are_never_copied_into_order():
    """Temporaries of many queries do not grow with what they read."""

    def temporaries(length):
        cache = PagedKVCache.empty(2, length, 4, 32, pages=length // 8, page_size=16)
        query = jax.ShapeDtypeStruct((2, 64, 8, 32), np.float32)
        compiled = jax.jit(attend).lower(query, cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes, cache.nbytes

    (short, n), (long, more) = map(temporaries, (4096, 32768))
    assert long - short < (more - n) / 100


@pytest.mark.parametrize("T", [1, 18])
def test_pages_of_int8_are_a_cache_of_int8(T, rng):
    cache, _ = empty(pages=20, dtype="int8")
    whole = KVCache.empty(B, P * M, K, H, value_dim=Hv, dtype="int8")
    for n, lengths in ((5, (5, 0, 3)), (T, (T, T, T))):
        key, value, query = tokens(rng, n)
        cache, whole = (
            jax.jit(type(c).append)(c, key, value, np.array(lengths)) for c in (cache, whole)
        )
        if n == 5:  # row 1 goes on in a copy of row 0's last page
            cache, whole = cache.reorder([0, 0, 2]), whole.reorder([0, 0, 2])
    for x, right in zip(cache.to_arrays(), whole.to_arrays(), strict=True):
        np.testing.assert_array_equal(x, right)
    for x, right in zip(with_lse(query, cache), with_lse(query, whole), strict=True):
        np.testing.assert_allclose(x, right, atol=3e-4 if T == 1 else 2e-2)


def test_gradients_and_vmap(rng):
    cache, _ = empty()
    key, value, query = tokens(rng, 2)
    cache = append(cache, key, value, np.array([2, 1, 2]))
    copy = KVCache.empty(B, P * M, K, H, value_dim=Hv).append(key, value, [2, 1, 2])
    both = (jax.jit(jax.grad(lambda q, c=c: jnp.sum(attend(q, c) ** 2))) for c in (cache, copy))
    np.testing.assert_allclose(*(f(query) for f in both), atol=1e-5)
    queries = np.stack([query, 2 * query])
    mine = jax.jit(jax.vmap(functools.partial(attend, cache=cache)))(queries)
    np.testing.assert_allclose(mine, np.stack([attend(q, cache) for q in queries]), atol=1e-6)


def test_errors_name_the_argument(rng):
    with pytest.raises(ValueError, match="page_size must be > 0; it is 0"):
        PagedKVCache.empty(1, 8, 1, 1, pages=2, page_size=0)
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        PagedKVCache.empty(1, 8, 1, 1, pages=2, dtype="int4")
    with pytest.raises(TypeError, match="prefix must be a KVCache; it is PagedKVCache"):
        attend(tokens(rng, 1)[2], empty()[0], prefix=empty()[0])
