"""Short sequences and few queries: several batch elements in a step, keys and values in place."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from oracle import assert_within_bound, attention, error_bound, finite_error

from flash_jax import KVCache, PredicateMask, attend, flash_attention, flash_attention_with_lse

ONE_KEY_TILE, MANY_KEY_TILES = (64, 1024), (64, 7)  # of the second, a step does one element


def inputs(rng, *, B, T, S, N, K, H, Hv, dtype=np.float32):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, Hv)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def check(arrays, block_sizes=None, **options):
    """Compares with the oracle, as the plain formula in the same dtype does."""
    wide = [np.asarray(x, np.float64) for x in arrays]
    exact = attention(*wide, **options)
    plain = attention(*wide, dtype=arrays[0].dtype, **options)
    results = flash_attention_with_lse(*arrays, **options, block_sizes=block_sizes)
    assert_within_bound(results, exact, plain, arrays[0].dtype)


@pytest.mark.parametrize(
    ("B", "T", "S", "N", "K", "dtype"),
    [
        *((3, 1, 37, 6, 3, dtype) for dtype in (jnp.float32, jnp.bfloat16)),
        *((1, 3, 531, 8, 4, dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)),
        (2, 1, 5, 1, 1, jnp.float16),
        (5, 2, 16, 3, 3, jnp.bfloat16),
        (5, 2, 16, 3, 3, jnp.float32),
    ],
)
def test_few_queries_agree_with_the_oracle(B, T, S, N, K, dtype, rng):
    check(inputs(rng, B=B, T=T, S=S, N=N, K=K, H=7, Hv=5, dtype=dtype))


@pytest.mark.parametrize("cached", [False, True])
def test_few_queries_of_many_keys_in_bfloat16_agree_with_the_oracle(cached, rng):
    """Where the processor multiplies bfloat16, values are weighed in pieces of 507 of these."""
    q, k, v = inputs(rng, B=1, T=2, S=1521, N=2, K=1, H=3, Hv=181, dtype=jnp.bfloat16)
    call = flash_attention
    if cached:
        cache = KVCache.empty(1, 1521, 1, 3, value_dim=181, dtype=jnp.bfloat16).append(k, v)
        call = lambda q, k, v: attend(q, cache, is_causal=False)  # noqa: E731
    exact, plain = (attention(q, k, v, dtype=x)[0] for x in (None, jnp.bfloat16))
    error = finite_error(call(q, k, v), exact)
    assert error <= error_bound(plain, exact, jnp.bfloat16)


@pytest.mark.parametrize("lengths", [(37, 1, 0), (18, 37, 29)])
@pytest.mark.parametrize("block_sizes", [ONE_KEY_TILE, MANY_KEY_TILES])
def test_few_queries_of_a_padded_cache_agree_with_the_oracle(lengths, block_sizes, rng):
    arrays = inputs(rng, B=3, T=2, S=37, N=6, K=3, H=7, Hv=5)
    check(arrays, block_sizes, key_value_seq_lengths=np.array(lengths, np.int32))


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block_sizes", [ONE_KEY_TILE, MANY_KEY_TILES])
def test_what_is_not_finite_stays_in_its_head_and_batch_element(which, bad, block_sizes, rng):
    arrays = inputs(rng, B=3, T=1, S=29, N=4, K=2, H=5, Hv=5)
    before = flash_attention(*arrays, block_sizes=block_sizes)
    arrays[which] = arrays[which].at[1, 11, 1, 2].set(bad)
    after = np.asarray(flash_attention(*arrays, block_sizes=block_sizes))
    touched = np.zeros(after.shape, bool)
    touched[1, 0, 2:] = True  # the query heads of key/value head 1
    np.testing.assert_allclose(after[~touched], np.asarray(before)[~touched], atol=1e-6)
    with np.errstate(invalid="ignore"):
        expected = attention(*arrays)[0]
    np.testing.assert_array_equal(np.isnan(after[touched]), np.isnan(expected[touched]))
    if which == 2:
        np.testing.assert_array_equal(np.isinf(after[touched]), np.isinf(expected[touched]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_position_of_a_cache_may_hold_anything(bad, rng):
    arrays = inputs(rng, B=3, T=1, S=29, N=4, K=2, H=5, Hv=5)
    lengths = jnp.array([29, 11, 3], jnp.int32)
    before = flash_attention(*arrays, key_value_seq_lengths=lengths)
    arrays[1:] = (x.at[1, 11:].set(bad).at[2, 3:].set(bad) for x in arrays[1:])
    after = flash_attention(*arrays, key_value_seq_lengths=lengths)
    np.testing.assert_array_equal(after, before)


def test_decoding_does_not_copy_the_cache(rng):
    arrays = inputs(rng, B=2, T=1, S=4099, N=8, K=4, H=32, Hv=32)
    memory = jax.jit(flash_attention).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < arrays[1].nbytes / 2


def odd_pairs(b, h, q, k):
    return (b + h + q + k) % 3 > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": PredicateMask(odd_pairs)},
        {
            "bias": np.linspace(-3, 3, 6 * 13, dtype=np.float32).reshape(6, 1, 1, 13),
            "dropout_rate": 0.3,
            "dropout_rng": jax.random.key(5),
        },
        {
            "key_value_seq_lengths": np.array([13, 0, 7, 1, 12, 13], np.int32),
            "sinks": np.array([0.5, -1, 2, 0], np.float32),
            "is_causal": True,
        },
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_batch_elements_that_share_a_step_are_as_alone(options, rng):
    arrays = inputs(rng, B=6, T=11, S=13, N=4, K=2, H=5, Hv=3)
    together, apart = (
        flash_attention_with_lse(*arrays, **options, block_sizes=block_sizes)
        for block_sizes in (ONE_KEY_TILE, MANY_KEY_TILES)
    )
    for x, y in zip(together, apart, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def test_vmapped_calls_share_a_step_whatever_they_share_else(rng):
    query, key, value = inputs(rng, B=3, T=11, S=13, N=4, K=2, H=5, Hv=3)
    queries = jnp.stack([query, query + 1])
    scales = jnp.array([0.3, 0.7], jnp.float32)

    def call(query, scale):
        return flash_attention(query, key, value, scale=scale, block_sizes=ONE_KEY_TILE)

    mapped = jax.vmap(call)(queries, scales)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], call(queries[i], scales[i]), rtol=1e-6)
