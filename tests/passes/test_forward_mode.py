"""Forward mode, and forward over reverse; reverse over reverse is refused."""

import functools

import jax
import numpy as np
import pytest
from derivatives import (
    floats,
    hessian_vector_product,
    jacfwd,
    jacrev,
    jvp,
    pairs_of,
    plain_attention,
    random_call,
    random_cotangents,
    weighed,
)
from jax import numpy as jnp
from jax.test_util import check_grads
from options import int32, parameters, split
from unoptimized import UNOPTIMIZED, run

from flash_jax import flash_attention, flash_attention_with_lse


@pytest.fixture
def small_call(rng):
    """Every parameter, causal, windowed and with lengths; every row reads a key. Float64."""
    sizes, dtype = {"B": 2, "T": 5, "S": 7, "N": 2}, np.float64
    return random_call(rng, **sizes, K=1, H=3, Hv=2, dtype=dtype) | {
        "bias": floats(rng, 1, 2, 5, 7, dtype=dtype),
        "is_causal": True,
        "local_window_size": (4, 2),
        "query_offset": int32(1, 2),
        "key_value_seq_lengths": int32(7, 4),
        "block_sizes": (2, 3),
        **parameters(rng, 2, dtype),
    }


@pytest.mark.usefixtures("x64")
def test_derivatives_are_the_limits_of_differences(small_call, rng):
    differentiable, arrays, static = split(small_call)

    def attend(x):
        return flash_attention_with_lse(**x, **arrays, **dict(static))

    check_grads(jax.jit(attend), (differentiable,), order=1, modes=("fwd", "rev"))
    weights = random_cotangents(rng, small_call)
    gradient = jax.jit(jax.grad(weighed(attend, weights)), compiler_options=UNOPTIMIZED)
    check_grads(gradient, (differentiable,), order=1, modes=("fwd",))


@pytest.mark.parametrize("transform", [jvp, jacfwd, jacrev, hessian_vector_product])
@pytest.mark.usefixtures("x64")
def test_forward_mode_agrees_with_the_plain_formula(transform, small_call, rng):
    x, arrays, static = split(small_call)
    dx = {name: np.asarray(rng.standard_normal(np.shape(y))) for name, y in x.items()}
    weights, pairs = random_cotangents(rng, small_call), pairs_of(small_call)

    def flash(x):
        return flash_attention_with_lse(**x, **arrays, **dict(static))

    def plain(x):
        return plain_attention(x, *pairs)

    results, exact = (run(functools.partial(transform, f), x, dx, weights) for f in (flash, plain))
    for x, right in zip(*map(jax.tree.leaves, (results, exact)), strict=True):
        assert x.dtype == np.float64
        bound = 32 * jnp.finfo(np.float64).eps * max(1, np.max(abs(right)))
        assert np.max(abs(x - right)) <= bound


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["none", "causal"])
def test_a_second_reverse_pass_is_refused(options, rng):
    """It would have to hold every tile's scores: the way to second derivatives is jvp of grad."""
    x = random_call(rng)
    loss = lambda q: jnp.sum(flash_attention(q, x["key"], x["value"], **options) ** 2)  # noqa: E731
    twice = jax.grad(lambda q: jnp.sum(jax.grad(loss)(q) ** 2))
    with pytest.raises((ValueError, NotImplementedError), match=r"[Rr]everse"):
        jax.make_jaxpr(twice)(x["query"])
