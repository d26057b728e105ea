"""Functions of scores: the catalogue, derivatives in what they capture, and what -inf hides."""

import functools

import jax
import numpy as np
import pytest
from bent_scores import SIZES, TILES, as_float64, attention_of, bent, random_call
from derivatives import MASKING, floats, hessian_vector_product, jvp, weighed
from formula import formula
from gradient_oracle import attention_gradients
from jax import numpy as jnp
from options import int32, random_inputs
from oracle import assert_within_bound, attention, kept_pairs
from score_mods import CATALOGUE, B, N, S, T, bucket, h, s, t, t5

from flash_jax import (
    BlockSparseMask,
    CausalMask,
    KVCache,
    PredicateMask,
    attend,
    flash_attention,
    flash_attention_int8,
    flash_attention_with_lse,
)

# --- The catalogue


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_agrees_with_its_formulas(name, rng):
    inputs, (call, exact) = random_inputs(rng, **SIZES), CATALOGUE[name](rng)
    right, plain = (attention(*inputs, **exact, dtype=x) for x in (None, np.float32))
    results = flash_attention_with_lse(*inputs, **call, block_sizes=TILES)
    assert_within_bound(results, right, plain, np.float32)


def test_the_gradient_of_a_learned_table_is_the_sum_of_those_of_its_pairs(rng):
    inputs, table = random_inputs(rng, **SIZES), floats(rng, N, 8)
    d_out, d_lse = floats(rng, B, T, N, 3), floats(rng, B, N, T)

    def call(table, query):
        mods = {"score_mod": t5(table), "is_causal": True, "block_sizes": TILES}
        return flash_attention_with_lse(query, *inputs[1:], **mods)

    results = jax.vjp(call, table, inputs[0])[1]((d_out, d_lse))
    bias = np.broadcast_to(table[h, bucket(t - s, np)], (1, N, T, S))
    kept = kept_pairs((B, N, T, S), is_causal=True)
    exact = attention_gradients(*inputs, d_out, d_lse, kept, bias=bias)
    of_table = np.zeros(table.shape)
    np.add.at(of_table, (h, bucket(t - s, np)), exact["bias"].exact)
    np.testing.assert_allclose(results[0], of_table, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(results[1], exact["query"].exact, rtol=1e-4, atol=2e-5)


def test_each_head_may_visit_blocks_of_its_own(rng):
    """A function is told of the keys that its head visits, not of those of another one."""
    inputs, bias = random_inputs(rng, **SIZES), floats(rng, N, 7)
    table = rng.random((N, -(-T // 4), -(-S // 5))) < 0.5
    kept = np.repeat(np.repeat(table, 4, axis=1), 5, axis=2)[None, :, :T, :S]
    values = bias[h, (t + s) % 7]
    right, plain = (attention(*inputs, values, kept, dtype=x) for x in (None, np.float32))
    mod = lambda score, b, h, q, k: score + jnp.asarray(bias)[h, (q + k) % 7]  # noqa: E731
    results = flash_attention_with_lse(
        *inputs, mask=BlockSparseMask(table, (4, 5)), score_mod=mod, block_sizes=(4, 5)
    )
    assert_within_bound(results, right, plain, np.float32)


# --- Derivatives of a function that bends scores, beside those of the formula in float64


def options_of(rng):
    """All others that change scores or mask them, with rows that read no key."""
    bias = floats(rng, N, T, S)
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    return {
        "bias": bias,
        "mask": rng.random((B, 1, T, S)) < 0.8,
        "scale": 0.7,
        "is_causal": True,
        "query_offset": int32(-3, 9),
        "query_seq_lengths": int32(T, T - 2),
        "key_value_seq_lengths": int32(S - 1, S),
        "logits_soft_cap": 1.7,
        "alibi_slopes": floats(rng, N) / 8,
        "sinks": floats(rng, N),
    }


def gradient(f, x, dx, weights):
    return jax.grad(weighed(f, weights))(x)


@pytest.mark.parametrize(
    ("derivative", "combined"),
    [(gradient, False), (jvp, True), (hessian_vector_product, True)],
    ids=["gradient", "jvp with every option", "hessian_vector_product with every option"],
)
def test_derivatives_are_those_of_the_formula(derivative, combined, rng):
    x, options = random_call(rng), options_of(rng) if combined else {}
    dx = {name: floats(rng, *y.shape) for name, y in x.items()}
    weights = floats(rng, B, T, N, 3), floats(rng, B, N, T)
    masking = {name: y for name, y in options.items() if name in MASKING}
    kept = {"mask": kept_pairs((B, N, T, S), options.get("bias"), **masking)}
    f = jax.jit(functools.partial(derivative, lambda x: attention_of(x, options)))
    results = f(x, dx, weights)
    with jax.enable_x64(True):
        exact_of = lambda x: attention_of(x, as_float64(options) | kept, formula)  # noqa: E731
        wide = as_float64((x, dx, weights))
        exact = jax.jit(functools.partial(derivative, exact_of))(*wide)
    for x_, y in zip(jax.tree.leaves(results), jax.tree.leaves(exact), strict=True):
        size = max(1.0, float(np.max(np.abs(y))))
        np.testing.assert_allclose(x_, y, rtol=0, atol=3e-5 * size)


# --- What -inf hides


@pytest.mark.parametrize("blocks", [TILES, None], ids=["tiles", "one tile"])
def test_what_a_score_of_minus_infinity_hides_changes_nothing(blocks, rng):
    """NaN behind it does not leak, in any pass, and a row without a key is zero."""
    query, key, value = random_inputs(rng, **SIZES)
    hidden = np.where((np.arange(S) % 4 == 1)[:, None, None], np.nan, value).astype(np.float32)

    def mod(score, b, h, q_index, k_index):
        return jnp.where((k_index % 4 == 1) | (q_index == 5), -jnp.inf, score * 1.5)

    def call(value):
        def loss(x):
            call = {"score_mod": mod, "block_sizes": blocks}
            out, lse = flash_attention_with_lse(*x, **call)
            return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isinf(lse), 0, lse)), (out, lse)

        return jax.value_and_grad(loss, has_aux=True)((query, key, value))

    ((_, (out, lse)), grads), clean = jax.jit(call)(hidden), jax.jit(call)(value)
    assert not np.any(out[:, 5])
    assert np.isneginf(lse[:, :, 5]).all()
    np.testing.assert_allclose(out, clean[0][1][0], rtol=1e-5, atol=1e-6)
    for x, y in zip(grads, clean[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


# --- The other functions that have it


def test_8_bits_give_its_function_the_whole_score(rng):
    """Also the part that all keys share, which a softmax alone does not need."""
    query, key, value = random_inputs(rng, **SIZES)
    key += 2
    bend = lambda s, b, h, q_index, k_index: 4 * jnp.tanh(s / 4)  # noqa: E731
    exact, _ = attention(query, key, value, logits_soft_cap=4)
    out = flash_attention_int8(query, key, value, score_mod=bend)
    assert np.max(np.abs(out - exact)) < 0.05


@pytest.mark.parametrize("tokens", [2, T])
def test_a_cache_gives_the_indices_of_its_slots(tokens, rng):
    x = random_call(rng)
    query, key, value = x["query"][:, :tokens], x["key"], x["value"]
    caches = {
        dtype: KVCache.empty(B, S + 3, kv_heads=2, head_dim=5, value_dim=3, dtype=dtype)
        for dtype in (np.float32, np.int8)
    }
    call = {"score_mod": bent(x), "is_causal": False, "query_offset": 0}
    exact = flash_attention(query, key, value, score_mod=bent(x))
    for dtype, cache in caches.items():
        out = attend(query, cache.append(key, value), **call)
        np.testing.assert_allclose(out, exact, atol=1e-5 if dtype == np.float32 else 0.1)


# --- Bounds of predicates


def test_a_predicate_tells_of_tiles_by_bounds_and_by_corners(rng):
    query, key, value = random_inputs(rng, **SIZES)
    causal = lambda b, h, q_index, k_index: k_index <= q_index  # noqa: E731
    window = lambda b, h, q_index, k_index: k_index > q_index - 7  # noqa: E731
    told = PredicateMask(causal, lambda b, h, q, k: (k.first <= q.last, k.last <= q.first))
    corners = PredicateMask(causal, monotone=True) & PredicateMask(window, monotone=True)
    call = {"block_sizes": TILES}
    exact = flash_attention(query, key, value, is_causal=True, **call)
    np.testing.assert_array_equal(flash_attention(query, key, value, mask=told, **call), exact)
    exact = flash_attention(query, key, value, mask=CausalMask(), local_window_size=(6, 0), **call)
    np.testing.assert_array_equal(flash_attention(query, key, value, mask=corners, **call), exact)
