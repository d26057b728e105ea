import jax
import numpy as np
import pytest
from jax import numpy as jnp

from flash_jax._passes import online_softmax as online
from flash_jax._passes.exp import exp

absorb, finish, merge = map(jax.jit, (online.absorb, online.finish, online.merge))


def state_of(s, v, block):
    state = online.start(len(s), v.shape[-1], s.dtype)
    for j in range(0, s.shape[1], block):
        state = absorb(state, s[:, j : j + block], v[j : j + block])
    return state


def exact(s, v):
    s, v = np.float64(s), np.float64(v)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)
    return p @ v / p.sum(-1, keepdims=True), (m + np.log(p.sum(-1, keepdims=True)))[:, 0]


@pytest.fixture
def scores(rng):
    s = rng.standard_normal((7, 30)).astype(np.float32) * 5
    return s, rng.standard_normal((30, 3)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 4, 7, 30])
def test_blocks_of_any_size_give_softmax_and_logsumexp(block, scores):
    out, lse = finish(state_of(*scores, block))
    expected = exact(*scores)
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=2e-6)


def test_merge_is_associative_commutative_and_has_an_identity(scores):
    s, v = scores
    a, b, c = (
        state_of(s[:, part], v[part], 5) for part in (slice(0, 3), slice(3, 17), slice(17, 30))
    )
    expected = finish(state_of(s, v, 30))
    for merged in (
        merge(merge(a, b), c),
        merge(a, merge(b, c)),
        merge(c, merge(b, a)),
    ):
        for x, y in zip(finish(merged), expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
    identity = online.start(7, 3, jnp.float32)
    for x, y in zip(merge(a, identity), a, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(scores):
    s, v = scores
    s[2] = -np.inf
    s[4, :29] = -np.inf
    out, lse = finish(state_of(s, v, 4))
    np.testing.assert_array_equal(out[2], 0)
    assert lse[2] == -np.inf
    np.testing.assert_array_equal(out[4], v[29])
    np.testing.assert_allclose(lse[4], s[4, 29], rtol=1e-6)
    empty = merge(*(online.start(7, 3, jnp.float32),) * 2)
    assert not np.isnan(jnp.concatenate([x.ravel() for x in empty])).any()


def test_logits_of_any_size_give_finite_results(scores):
    s, v = scores
    for scale in (1e30, -1e30, 0.0):
        for x in finish(state_of(s * np.float32(scale), v, 4)):
            assert np.isfinite(x).all()


def test_exp_is_within_two_ulps_of_exp_in_float64(rng):
    x = -np.abs(rng.standard_normal(100_001)).astype(np.float32) * 20
    x = np.concatenate([x[x > -87], [0.0, -1e-30]]).astype(np.float32)
    got = np.asarray(jax.jit(exp)(x), np.float64)
    expected = np.exp(np.float64(x))
    # The argument is rounded once, when it is taken to base 2: half an ulp of x log2 e.
    bound = 2.0**-23 * (2 + np.abs(x) * np.log2(np.e) * np.log(2))
    assert (np.abs(got / expected - 1) <= bound).all()


def test_exp_at_the_ends_of_its_range():
    x = jnp.array([0.0, -0.0, -jnp.inf, -200.0, -3e38, jnp.nan], jnp.float32)
    got = np.asarray(jax.jit(exp)(x))
    np.testing.assert_array_equal(got, [1, 1, 0, 0, 0, np.nan])
