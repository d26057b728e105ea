"""What a cache holds, where it is written, and what it refuses."""

import re

import jax
import numpy as np
import pytest
from caches import (
    KINDS,
    SLOTS,
    B,
    Hv,
    K,
    N,
    append,
    both,
    empty,
    grow,
    tokens,
    with_lse,
)
from jax import numpy as jnp

from flash_jax import KVCache, attend


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
    key, value, first = map(np.asarray, cache.to_arrays())
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


def test_outside_jit_a_method_is_one_program(rng, caplog):
    """And one that binds integers, which all methods share. What is checked needs none."""
    rows = 5  # as no other test has: what was compiled before is not compiled again

    def programs(call):
        caplog.clear()
        with jax.log_compiles():
            jax.block_until_ready(call())
        found = [re.match(r"Compiling (?:jit\()?(\w+)", x.message) for x in caplog.records]
        return [x[1] for x in found if x and x[1] != "stage"]  # of NumPy to JAX

    cache = empty(rows=rows)
    key, value, query = map(jnp.asarray, tokens(rng, 3, rows))
    ragged = np.arange(rows, dtype=np.int32) % 3
    assert programs(lambda: cache.append(key, value)) == ["_append"]
    assert programs(lambda: cache.append(key, value, ragged)) == ["_row_integers", "_append"]
    cache = cache.append(key, value)
    assert programs(lambda: attend(query, cache)) == ["_attend"]
    assert programs(lambda: cache.truncate(ragged)) == ["_shortened"]
    assert programs(lambda: cache.reorder(ragged[:3])) == ["_taken"]
    assert programs(cache.to_arrays) == ["_in_order"]
    assert programs(lambda: attend(query, cache.append(key, value))) == []


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
    "lengths must fit into int32": lambda cache, x: cache.append(x, x[..., :Hv], [2**40, 0]),
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
    with pytest.raises(NotImplementedError, match="score_mod must be None where the cache has"):
        attend(query, cache, score_mod=lambda score, b, h, q_index, k_index: score)
    with pytest.raises(TypeError, match="cache must be a KVCache or PagedKVCache; it is list"):
        attend(query, [])
    with pytest.raises(TypeError, match="rows must be bools or integers"):
        cache.reset(0.5)
