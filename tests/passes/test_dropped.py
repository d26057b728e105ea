"""Dropped probabilities: the same whatever the tiles, at the rate, and by key, head and element."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from options import TILES, B, K, N, S, T, everything, random_inputs
from oracle import assert_within_bound, attention

from flash_jax import flash_attention, flash_attention_with_lse


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
    for blocks in [TILES, None]:
        run = functools.partial(flash_attention, **options, dropout_rate=0.25, block_sizes=blocks)
        run = run if blocks else jax.jit(run)
        out = np.asarray(run(q, k, v, dropout_rng=jax.random.key(7)))
        dropped.append((out == 0) & (p > 0))
        np.testing.assert_allclose(out, np.where(dropped[-1], 0, p / 0.75), rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(*dropped)


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
