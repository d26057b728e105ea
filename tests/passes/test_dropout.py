"""Dropout: which probabilities it drops, of how good a hash, and at what cost to the compiler."""

import functools

import jax
import numpy as np
import pytest
from layers import dropout_factors
from options import random_inputs

from flash_jax import flash_attention
from flash_jax._passes.dropout import bind_key, threefry

# --- The hash


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_threefry_gives_the_words_that_its_authors_publish(key, counter, expected):
    """The known answers of Random123 for Threefry-2x32 of 13 rounds."""
    words = threefry(*(tuple(np.array([x], np.uint32) for x in pair) for pair in (key, counter)))
    assert tuple(int(x[0]) for x in words) == expected


B, N, T, S = 2, 2, 127, 257
LAGS = 1, 2, 3, 7, 8, 64


@pytest.fixture(scope="module", params=[0.1, 0.5])
def dropped(request):
    """The rate, and for two keys that follow each other what is dropped, (2, B, N, T, S)."""
    rate = request.param
    factors = [dropout_factors(jax.random.key(i), rate, B, T, N, S) for i in range(2)]
    return rate, np.stack(factors) == 0


def assert_normal(rate, *products):
    """Means of products of centred bits, as many to each as arrays, are those of chance."""
    deviation = np.sqrt(rate * (1 - rate))
    for arrays in products:
        x = functools.reduce(np.multiply, ((x - rate) / deviation for x in arrays))
        assert abs(x.mean()) < 5 / np.sqrt(x.size)


def test_as_many_are_dropped_as_the_rate_says_overall_and_in_rows_and_columns(dropped):
    rate, x = dropped
    assert_normal(rate, [x])
    for axis in range(x.ndim):
        n, p = x.shape[axis], rate * (1 - rate)
        chi = (x.sum(axis) - n * rate) ** 2 / (n * p)
        # The variance of the square of a standardized binomial sum.
        deviation = np.sqrt((2 + (1 - 6 * p) / (n * p)) / chi.size)
        assert abs(chi.mean() - 1) < 5 * deviation


def test_neighbours_are_dropped_independently(dropped):
    """Neighbours in s, in t and on both diagonals; heads, batch elements and PRNG keys."""
    rate, x = dropped
    assert_normal(rate, *([x[..., n:], x[..., :-n]] for n in LAGS))
    assert_normal(rate, *([x[..., n:, :], x[..., :-n, :]] for n in LAGS))
    assert_normal(rate, *([x[..., n:, n:], x[..., :-n, :-n]] for n in LAGS))
    assert_normal(rate, *([x[..., n:, :-n], x[..., :-n, n:]] for n in LAGS))
    i, j = np.tril_indices(T, -1)
    assert_normal(rate, [x[..., i, j], x[..., j, i]])
    assert_normal(rate, [x[0], x[1]], [x[:, 0], x[:, 1]], [x[:, :, 0], x[:, :, 1]])


def test_runs_and_rectangles_are_as_frequent_as_by_chance(dropped):
    """A hash of row plus one of column passes every test of pairs, and fails at rectangles."""
    rate, x = dropped
    assert_normal(rate, [x[..., 2:], x[..., 1:-1], x[..., :-2]])
    assert_normal(rate, [x[..., 2:, :], x[..., 1:-1, :], x[..., :-2, :]])
    for n in LAGS:
        corners = x[..., n:, n:], x[..., n:, :-n], x[..., :-n, n:], x[..., :-n, :-n]
        assert_normal(rate, corners)


def test_keys_of_every_kind_draw_their_own():
    keys = [jax.random.key(i, impl=kind) for kind in ("threefry2x32", "rbg") for i in range(3)]
    words = [np.asarray(bind_key(key, 5)) for key in keys]
    assert len(np.unique(np.concatenate(words), axis=0)) == 5 * len(keys)
    for key, five in zip(keys, words, strict=True):  # an element has its key in every batch
        np.testing.assert_array_equal(bind_key(key, 3), five[:3])


# --- The same in every batch element and head


def test_broadcast_dropout_drops_the_same_in_every_element_and_head():
    factors = functools.partial(dropout_factors, jax.random.key(4), 0.3, T=31, S=37)
    own, shared = factors(B=3, N=2), factors(B=3, N=2, broadcast_dropout=True)
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1, :1], shared.shape))
    assert len(np.unique(own.reshape(6, -1), axis=0)) == 6
    # It depends on neither the tiles nor the number of elements and heads.
    again = factors(B=1, N=4, broadcast_dropout=True, block_sizes=(5, 7))
    np.testing.assert_array_equal(again[0, :2], shared[0])
    assert abs(np.mean(shared[0, 0] == 0) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / (31 * 37))


def test_broadcast_dropout_under_vmap_draws_by_the_keys_of_the_calls(rng):
    inputs, keys = random_inputs(rng, B=2, T=5, S=7), jax.random.split(jax.random.key(1), 3)
    run = functools.partial(flash_attention, dropout_rate=0.5, broadcast_dropout=True)
    calls = jax.vmap(lambda key: run(*inputs, dropout_rng=key))(keys)
    for out, key in zip(calls, keys, strict=True):
        np.testing.assert_allclose(out, run(*inputs, dropout_rng=key), rtol=0, atol=1e-6)
    assert np.abs(calls[0] - calls[1]).max() > 1e-2


# --- The compiler


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.grad], ids=["forward", "gradient"])
def test_dropout_makes_a_program_at_most_three_times_as_large(wrap):
    """Of machine code, which takes the time: at 9 x 11 it was over five times as much."""
    q, k = np.ones((1, 9, 1, 4), np.float32), np.ones((1, 11, 1, 4), np.float32)

    def size(rate):
        def call(q, k, key):
            return flash_attention(q, k, k, dropout_rate=rate, dropout_rng=key).sum()

        compiled = jax.jit(wrap(call)).lower(q, k, jax.random.key(0)).compile()
        return len(compiled.runtime_executable().serialize())

    assert size(0.1) <= 3 * size(0.0)
