"""Functions of scores under the transformations of JAX, and how often one is compiled."""

import jax
import numpy as np
import pytest
from bent_scores import IDS, SIZES, as_float64, attention_of, bent, random_call
from derivatives import floats
from formula import formula
from jax import numpy as jnp
from options import random_inputs
from score_mods import B, N

from flash_jax import flash_attention
from flash_jax._api.attention import attention_of_floats


def test_a_new_function_that_computes_the_same_is_not_compiled_again(rng):
    inputs = random_inputs(rng, **SIZES)

    def call(table, factor=2.0):
        mod = lambda s, b, h, q_index, k_index: s + factor * table[h] + IDS_[k_index]  # noqa: E731
        return flash_attention(*inputs, score_mod=mod)

    IDS_ = jnp.asarray(IDS)
    tables = jnp.asarray(floats(rng, 3, N))
    first, count = call(tables[0]), attention_of_floats._cache_size()  # pyright: ignore
    others = [call(x) for x in tables[1:]]
    assert attention_of_floats._cache_size() == count  # pyright: ignore
    call(tables[0], 3.0)
    assert attention_of_floats._cache_size() == count + 1  # pyright: ignore
    assert not any(np.array_equal(first, x) for x in others)


def test_one_function_with_a_rule_of_its_own_is_compiled_once(rng):
    inputs = random_inputs(rng, **SIZES)
    mod = lambda s, b, h, q_index, k_index: jax.nn.relu(s)  # noqa: E731
    flash_attention(*inputs, score_mod=mod)
    count = attention_of_floats._cache_size()  # pyright: ignore
    flash_attention(*inputs, score_mod=mod)
    assert attention_of_floats._cache_size() == count  # pyright: ignore


def test_no_tracer_is_kept(rng):
    query, key, value = random_inputs(rng, **SIZES)

    def loss(table):
        mod = lambda s, b, h, q_index, k_index: s + table[h]  # noqa: E731
        return flash_attention(query, key, value, score_mod=mod).sum()

    with jax.checking_leaks():
        jax.jit(jax.grad(loss))(floats(rng, N))


def test_vmap_maps_what_a_function_captures(rng):
    x = random_call(rng)
    tables, queries = floats(rng, 3, *x["table"].shape), floats(rng, 3, *x["query"].shape)

    def loss(table, query):
        return attention_of(x | {"table": table, "query": query}, {})[0].sum()

    f = jax.grad(loss, argnums=(0, 1))
    mapped = jax.jit(jax.vmap(f))(tables, queries)
    looped = [jax.jit(f)(*pair) for pair in zip(tables, queries, strict=True)]
    for i, y in enumerate(map(np.stack, zip(*looped, strict=True))):
        np.testing.assert_allclose(mapped[i], y, rtol=1e-4, atol=1e-5)


def test_through_scan_and_remat(rng):
    x = random_call(rng)
    tables = floats(rng, 2, *x["table"].shape)

    def step(query, table):
        out, _ = attention_of(x | {"query": query, "table": table}, {})
        return query + jnp.pad(out, [(0, 0)] * 3 + [(0, 2)]), None

    def scanned(tables):
        return jnp.sum(jax.lax.scan(jax.checkpoint(step), x["query"], tables)[0])

    def looped(tables):
        query = jnp.asarray(x["query"])
        for table in tables:
            query, _ = step(query, table)
        return jnp.sum(query)

    results = (jax.jit(jax.grad(f))(tables) for f in (scanned, looped))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_an_exported_call_takes_every_length(rng):
    x = random_call(rng)
    lengths = jax.export.symbolic_shape("t, s")
    specs = [
        jax.ShapeDtypeStruct((B, n, *x[name].shape[2:]), np.float32)
        for name, n in zip(("query", "key", "value"), (lengths[0], *lengths[1:] * 2), strict=True)
    ]
    call = lambda query, key, value: flash_attention(query, key, value, score_mod=bent(x))  # noqa: E731
    exported = jax.export.export(jax.jit(call))(*specs)
    qkv = [x[name] for name in ("query", "key", "value")]
    np.testing.assert_allclose(exported.call(*qkv), call(*qkv), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_disable_jit_and_float64_change_no_result(rng):
    x = as_float64(random_call(rng))
    exact, _ = attention_of(x, {}, formula)
    out, _ = attention_of(x, {})
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, exact, rtol=1e-12, atol=1e-13)
    with jax.disable_jit():
        np.testing.assert_array_equal(attention_of(x, {})[0], out)
