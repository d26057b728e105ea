"""What is masked has no gradient and cannot leak; huge logits have finite gradients."""

import functools

import jax
import numpy as np
import pytest
from derivatives import (
    floats,
    gradients,
    hessian_vector_product,
    jvp,
    pairs_of,
    random_call,
    random_cotangents,
)
from jax import numpy as jnp
from options import (
    LENGTHS,
    TILES,
    B,
    Hv,
    K,
    N,
    S,
    T,
    masking_bias,
    parameters,
    random_mask,
    segments,
    split,
)

from flash_jax import flash_attention, flash_attention_with_lse


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_what_is_read_by_none_or_reads_nothing_has_zero_gradients(sinks, rng):
    call = hiding_call(rng, "lengths and sinks" if sinks else "lengths")
    found = gradients(call, random_cotangents(rng, call))
    kept, _, _ = pairs_of(call)
    reads, read = kept.any(axis=(1, 3)), kept.any(axis=(1, 2))
    pairs = kept.any(axis=1, keepdims=True)
    assert not reads.all()
    assert not read.all()
    for name, seen in {"query": reads, "key": read, "value": read, "bias": pairs}.items():
        x = np.asarray(found[name])
        assert not x[~seen].any()
        assert x[seen].any()


# Without sinks lse of a row that reads nothing is -inf, and its cotangent is padding, too.
HIDING = {
    "mask": (lambda rng: {"mask": random_mask(rng, B, 1, T, S)}, True),
    "bias": (lambda rng: {"bias": masking_bias(rng, B, 1, T, S)}, True),
    "lengths": (lambda rng: LENGTHS, False),
    "lengths and sinks": (lambda rng: LENGTHS, True),
    "segments": (segments, False),
}


def hiding_call(rng, name):
    options, sinks = HIDING[name]
    call = random_call(rng) | parameters(rng) | {"block_sizes": TILES, **options(rng)}
    if not sinks:
        del call["sinks"]
    return {"bias": floats(rng, B, 1, T, S)} | call


def poisoned(call, cotangents, poison):
    """call and cotangents with poison in all that no pair that is kept has."""
    kept, _, _ = pairs_of(call)
    reads, read = kept.any(axis=(1, 3)), kept.any(axis=(1, 2))
    worse = {name: call[name].copy() for name in ("query", "key", "value", "bias")}
    worse["query"][~reads] = worse["key"][~read] = worse["value"][~read] = poison
    worse["bias"][~kept.any(axis=1, keepdims=True) & ~np.isneginf(call["bias"])] = poison
    d_out, d_lse = (x.copy() for x in cotangents)
    d_out[~reads] = poison
    if "sinks" not in call:
        np.swapaxes(d_lse, 1, 2)[~reads] = poison
    assert not reads.all()
    return call | worse, (d_out, d_lse)


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_nothing_behind_a_mask_reaches_a_gradient(name, poison, rng):
    call = hiding_call(rng, name)
    cotangents = random_cotangents(rng, call)
    before = gradients(call, cotangents)
    after = gradients(*poisoned(call, cotangents, poison))
    for operand, x in before.items():
        np.testing.assert_array_equal(after[operand], x, err_msg=operand)


@pytest.mark.parametrize("transform", [jvp, hessian_vector_product])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_nothing_behind_a_mask_reaches_a_tangent(transform, poison, rng):
    call = hiding_call(rng, "lengths and sinks")
    weights = random_cotangents(rng, call)
    x, arrays, static = split(call)
    dx = {name: np.asarray(rng.standard_normal(y.shape), np.float32) for name, y in x.items()}
    worse, worse_weights = poisoned(call, weights, poison)
    worse_dx, _ = poisoned(call | dx, weights, poison)
    run = hidden_tangents(transform, tuple(arrays), static)
    before = run(x, dx, weights, *arrays.values())
    worse, worse_dx = ({name: y[name] for name in x} for y in (worse, worse_dx))
    after = run(worse, worse_dx, worse_weights, *arrays.values())
    for y, right in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(y, right)


@functools.cache
def hidden_tangents(transform, names, static):
    @jax.jit
    def run(x, dx, weights, *arrays):
        options = dict(zip(names, arrays, strict=True)) | dict(static)
        return transform(lambda x: flash_attention_with_lse(**x, **options), x, dx, weights)

    return run


def test_gradients_run_where_jax_checks_for_nan(rng):
    call = random_call(rng) | LENGTHS | parameters(rng) | {"bias": masking_bias(rng, B, 1, T, S)}
    differentiable, arrays, static = split(call)

    def loss(x):
        return jnp.sum(flash_attention(**x, **arrays, **dict(static)) ** 2)

    with jax.debug_nans(True), jax.numpy_dtype_promotion("strict"):
        for name, x in jax.jit(jax.grad(loss))(differentiable).items():
            assert np.any(x), name


@pytest.mark.parametrize("magnitude", [1e4, 1e10])
@pytest.mark.parametrize("options", ["scale", "soft cap", "alibi and bias"])
def test_huge_logits_have_finite_gradients_and_probabilities_of_sum_one(options, magnitude, rng):
    T, S, H = 37, 53, 24
    extra = {
        "scale": {"scale": np.float32(magnitude)},
        "soft cap": {"scale": np.float32(magnitude), "logits_soft_cap": np.float32(3 * magnitude)},
        "alibi and bias": {
            "alibi_slopes": np.full(N, magnitude, np.float32),
            "query_offset": 3,
            "bias": np.float32(magnitude) * floats(rng, N, 1, S),
        },
    }[options]
    call = random_call(rng, T=T, S=S, H=H) | extra | {"block_sizes": (16, 24)}
    d_out, d_lse = random_cotangents(rng, call)
    found = gradients(call, (d_out, d_lse))
    for name, x in found.items():
        assert np.isfinite(x).all(), name
    # As every query's probabilities have sum 1, values get just what the outputs have.
    given = d_out.astype(np.float64).reshape(B, T, K, N // K, Hv).sum(axis=(1, 3))
    np.testing.assert_allclose(np.sum(found["value"], axis=1), given, rtol=0, atol=1e-4)
