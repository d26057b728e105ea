"""Caches under the transformations and in the modes of JAX."""

import functools

import jax
import numpy as np
import pytest
from caches import (
    SLOTS,
    B,
    G,
    H,
    Hv,
    K,
    N,
    append,
    empty,
    tokens,
    with_lse,
)
from jax import export
from jax import numpy as jnp

from flash_jax import PagedKVCache, attend, attend_with_lse


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


def test_results_are_the_same_outside_jit(rng):
    key, value, query = tokens(rng, 3)
    cache = empty().append(key, value)
    np.testing.assert_allclose(attend(query, cache), with_lse(query, cache)[0], atol=1e-6)
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes


def step(cache, query, key, value):
    cache = cache.append(key, value)
    return attend(query, cache), cache


@pytest.mark.parametrize("kind", ["float32", "int8 window", "pages"])
def test_a_step_is_exported_with_its_cache(kind, rng):
    """With a symbolic batch size, where the numbers of a cache of floats are the same."""
    if kind == "pages":
        cache = PagedKVCache.empty(B, 12, K, H, value_dim=Hv, pages=9, page_size=4)
    else:
        cache = empty(kind)
    old, (key, value, query) = tokens(rng, 3)[:2], tokens(rng, 1)
    args = cache.append(*old), query, key, value
    right, grown = jax.jit(step)(*args)
    shapes = jax.eval_shape(lambda x: x, args)
    if kind != "int8 window":
        (rows,) = export.symbolic_shape("rows")

        def symbolic(x):
            shape = tuple(rows if n == B and i == 0 else n for i, n in enumerate(x.shape))
            return jax.ShapeDtypeStruct(shape, x.dtype)

        shapes = jax.tree.map(symbolic, shapes)
    stored = export.export(jax.jit(step))(*shapes).serialize()
    out, after = export.deserialize(stored).call(*args)
    np.testing.assert_allclose(out, right, atol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(grown)
    for x, y in zip(*map(jax.tree.leaves, (after, grown)), strict=True):
        np.testing.assert_array_equal(x, y)


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
