"""Gradients through vmap, scan, checkpoint, export and donation."""

import functools

import jax
import numpy as np
import pytest
from derivatives import floats, gradients, pairs_of, plain_attention, random_call, random_cotangents
from jax import export, lax
from jax import numpy as jnp
from options import TILES, B, H, Hv, N, S, T, int32, parameters, random_mask, split
from unoptimized import UNOPTIMIZED

from flash_jax import flash_attention, flash_attention_with_lse


def test_integers_have_float0_tangents(rng):
    x = random_call(rng)
    attend = lambda q, n: flash_attention(q, x["key"], x["value"], query_seq_lengths=n)  # noqa: E731
    out, pull = jax.vjp(attend, x["query"], int32(7, 3))
    _, of_lengths = pull(out)
    assert of_lengths.dtype == jax.dtypes.float0


def attend_in_vmap(x):
    """Of one element of a batch, with whatever options are given."""
    return flash_attention_with_lse(**x, is_causal=True, block_sizes=TILES)


def loss_of_call(x, weights):
    out, lse = attend_in_vmap(x)
    return jnp.vdot(out, weights[0]) + jnp.vdot(jnp.where(jnp.isneginf(lse), 0, lse), weights[1])


def gradient_of_call(x, weights):
    differentiable, arrays, _ = split(x)
    return jax.grad(lambda y: loss_of_call(y | arrays, weights))(differentiable)


@pytest.fixture
def vmapped(rng):
    """Four calls stacked, without the axis B, and their weights."""
    call = random_call(rng, B=4) | {
        "bias": floats(rng, 4, N, 1, S),
        "mask": random_mask(rng, 4, 1, T, S),
        "key_value_seq_lengths": int32(S, 0, 3, 11),
        "query_offset": int32(6, 2, 0, -3),
        "scale": floats(rng, 4),
        "sinks": floats(rng, 4, N),
    }
    weights = floats(rng, 4, T, N, Hv), floats(rng, 4, N, T)
    return call, weights


unoptimized = functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
one = unoptimized(gradient_of_call)


def looped(x, weights, shared):
    """Gradients of each call by itself, stacked."""
    loop = [
        one({name: y if name in shared else y[i] for name, y in x.items()}, [w[i] for w in weights])
        for i in range(4)
    ]
    return jax.tree.map(lambda *y: np.stack(y), *loop)


@pytest.mark.parametrize("shared", [("key", "value"), ("query", "bias", "mask")], ids=" ".join)
def test_gradients_of_a_vmap_are_sums_over_its_calls(shared, vmapped):
    calls, weights = vmapped
    x = {name: y[1] if name in shared else y for name, y in calls.items()}
    losses = jax.vmap(
        loss_of_call, in_axes=({name: None if name in shared else 0 for name in x}, 0)
    )
    differentiable, arrays, _ = split(x)

    @unoptimized
    def of_all(differentiable):
        return jax.grad(lambda y: jnp.sum(losses(y | arrays, weights)))(differentiable)

    expected = looped(x, weights, shared)
    for name, total in of_all(differentiable).items():
        right = expected[name].sum(axis=0) if name in shared else expected[name]
        size = max(1, np.max(abs(expected[name])))
        np.testing.assert_allclose(total, right, rtol=0, atol=1e-5 * size)


def test_a_vmap_of_gradients_is_a_loop(vmapped):
    calls, weights = vmapped
    shared = "key", "key_value_seq_lengths", "sinks"
    x = {name: y[1] if name in shared else y for name, y in calls.items()}
    axes = {name: None if name in shared else 0 for name in x}
    found = unoptimized(jax.vmap(gradient_of_call, in_axes=(axes, 0)))(x, weights)
    for name, expected in looped(x, weights, shared).items():
        size = max(1, np.max(abs(expected)))
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-6 * size)


def test_nested_vmaps_of_gradients_are_loops(vmapped):
    calls, weights = vmapped
    x = {name: y if name in ("query", "sinks") else y[:2] for name, y in calls.items()}
    x["value"], x["scale"] = x["value"][0], x["scale"][0]
    outer = {name: 0 if name in ("query", "sinks") else None for name in x}
    inner = {name: None if name in ("query", "sinks", "value", "scale") else 0 for name in x}
    weights = [w[0] for w in weights]
    nested = jax.vmap(jax.vmap(gradient_of_call, in_axes=(inner, None)), in_axes=(outer, None))
    results = unoptimized(nested)(x, weights)
    for i, j in np.ndindex(4, 2):
        at = {
            name: y[i] if outer[name] == 0 else y if inner[name] is None else y[j]
            for name, y in x.items()
        }
        for name, y in one(at, weights).items():
            size = max(1, np.max(abs(y)))
            np.testing.assert_allclose(results[name][i, j], y, rtol=0, atol=2e-6 * size)


def test_gradients_through_a_scan_over_checkpointed_layers(rng):
    x, w = floats(rng, B, T, N, H), floats(rng, 3, H, H) / H
    lengths = int32(9, 4)
    call = {"query": x, "key": x, "is_causal": True, "key_value_seq_lengths": lengths}
    kept, distance, one = pairs_of(call)
    attend = functools.partial(flash_attention, is_causal=True, key_value_seq_lengths=lengths)

    def plain(q, k, v):
        return plain_attention({"query": q, "key": k, "value": v}, kept, distance, one)[0]

    def loss(x, w, attend, remat, scan):
        layer = remat(lambda x, w: (x + attend(x @ w, x, jnp.sin(x)), None))
        return jnp.sum(scan(layer, x, w)[0] ** 3)

    def unrolled(layer, x, w):
        for each in w:
            x, _ = layer(x, each)
        return x, None

    found = jax.jit(jax.grad(lambda x, w: loss(x, w, attend, jax.checkpoint, lax.scan), (0, 1)))(
        x, w
    )
    right = jax.jit(jax.grad(lambda x, w: loss(x, w, plain, lambda f: f, unrolled), (0, 1)))(x, w)
    for y, expected in zip(found, right, strict=True):
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.max(abs(expected)))


@pytest.fixture
def exact_case(rng):
    """A function of query, key, value and lengths that gives gradients, and its arguments."""

    def gradient(q, k, v, lengths):
        attend = functools.partial(flash_attention, key_value_seq_lengths=lengths, is_causal=True)
        return jax.grad(lambda *qkv: jnp.sum(attend(*qkv) ** 2), argnums=(0, 1, 2))(q, k, v)

    return gradient, (*random_call(rng).values(), int32(3, 15))


def test_an_exported_gradient_takes_other_lengths(exact_case):
    gradient, (*qkv, lengths) = exact_case
    exported = export.export(jax.jit(gradient))(*qkv, lengths)
    reloaded = export.deserialize(exported.serialize())
    for n in (lengths, int32(0, S)):
        for x, y in zip(reloaded.call(*qkv, n), jax.jit(gradient)(*qkv, n), strict=True):
            np.testing.assert_array_equal(x, y)


def test_gradients_can_take_the_memory_of_donated_operands(exact_case):
    gradient, (*qkv, lengths) = exact_case
    expected = jax.jit(gradient)(*qkv, lengths)
    donated = [jnp.array(x) for x in qkv]
    found = jax.jit(gradient, donate_argnums=(0, 1, 2))(*donated, lengths)
    for x, y, gone in zip(found, expected, donated, strict=True):
        np.testing.assert_array_equal(x, y)
        assert gone.is_deleted()


def test_gradients_are_the_same_bits_every_time(rng):
    call = random_call(rng, T=257, S=263) | {"is_causal": True} | parameters(rng)
    cotangents = random_cotangents(rng, call)
    first = gradients(call, cotangents)
    for _ in range(3):
        for name, x in gradients(call, cotangents).items():
            np.testing.assert_array_equal(x, first[name])
