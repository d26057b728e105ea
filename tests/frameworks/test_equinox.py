"""The layer of Equinox: as Equinox's own, of its weights."""

import functools
import io

import equinox as eqx
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from layers import as_array, assert_same, dropout_factors, padding, random

import flash_jax
import flash_jax.equinox

T, S, N, D = 7, 11, 3, 12


def layer(**options):
    return eqx.nn.MultiheadAttention(N, D, key=jax.random.key(0), **options)


def rotated(query, key, value):
    rotate = jax.vmap(eqx.nn.RotaryPositionalEmbedding(4), 1, 1)
    return rotate(query), rotate(key), value


SIZES = {
    "key_size": 5,
    "value_size": 9,
    "output_size": 8,
    "qk_size": 6,
    "vo_size": 7,
    **{f"use_{name}_bias": True for name in ("query", "key", "value", "output")},
}
CASES = {
    "sizes and biases": (SIZES, lambda rng: {"mask": padding(rng, T, S)}),
    "mask of heads": ({}, lambda rng: {"mask": padding(rng, N, T, S), "process_heads": rotated}),
    "Mask": (
        {"dropout_p": 0.5, "inference": True},
        lambda rng: {"mask": flash_jax.CausalMask()},
    ),
}


@pytest.mark.parametrize(("options", "call"), CASES.values(), ids=CASES)
def test_the_layer(options, call, rng):
    theirs, call = layer(**options), call(rng)
    params, static = eqx.partition(theirs, eqx.is_array)
    their_call = call | {"mask": as_array(call["mask"], N, T, S)}
    sizes = (T, D), (S, options.get("key_size", D)), (S, options.get("value_size", D))

    def ours(params, *inputs):
        return flash_jax.equinox.from_equinox(eqx.combine(params, static))(*inputs, **call)

    def own(params, *inputs):
        return eqx.combine(params, static)(*inputs, **their_call)

    assert_same(ours, own, params, tuple(random(rng, *shape) for shape in sizes))


def test_a_batch(rng):
    theirs, x = layer(), random(rng, 2, T, D)
    params, static = eqx.partition(theirs, eqx.is_array)
    ours = flash_jax.equinox.from_equinox

    def batched(convert):
        def call(params, x):
            return jax.vmap(lambda x: convert(eqx.combine(params, static))(x, x, x))(x)

        return call

    assert_same(batched(ours), batched(lambda layer: layer), params, (x,))


def test_dropout(rng):
    """The plain formula with the same probabilities dropped."""
    theirs, key, x = layer(dropout_p=0.3), jax.random.key(3), random(rng, T, D)
    params, static = eqx.partition(theirs, eqx.is_array)
    factors = dropout_factors(key, 0.3, 1, T, N, T)[0]
    assert np.any(factors == 0)

    def ours(params, x):
        model = flash_jax.equinox.from_equinox(eqx.combine(params, static))
        return model(x, x, x, key=key)

    def plain(params, x):
        model = eqx.combine(params, static)
        projections = model.query_proj, model.key_proj, model.value_proj
        q, k, v = (jax.vmap(project)(x).reshape(T, N, -1) for project in projections)
        weights = jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1]))
        out = jnp.einsum("nts,snh->tnh", weights * factors.astype(x.dtype), v)
        return jax.vmap(model.output_proj)(out.reshape(T, -1))

    assert_same(ours, plain, params, (x,))


def test_every_layer_of_a_model_is_converted(rng):
    subclass = Subclass(N, D, key=jax.random.key(1))
    model = {"blocks": [layer(), layer()], "norm": eqx.nn.LayerNorm(D), "other": subclass}
    converted = flash_jax.equinox.from_equinox(model)
    assert all(isinstance(x, flash_jax.equinox.MultiheadAttention) for x in converted["blocks"])
    assert type(converted["other"]) is Subclass
    for ours, theirs in zip(jax.tree.leaves(converted), jax.tree.leaves(model), strict=True):
        assert ours is theirs


class Attention(eqx.Module):
    """Attention of a model's own, as an einsum."""

    weight: jax.Array

    def __call__(self, x):
        return jax.nn.softmax(x @ self.weight @ x.T) @ x


class Subclass(eqx.nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    "model",
    [
        Attention(jnp.eye(D)),
        [Subclass(N, D, key=jax.random.key(1)), eqx.nn.Linear(D, D, key=jax.random.key(2))],
        flash_jax.equinox.from_equinox(eqx.nn.MultiheadAttention(N, D, key=jax.random.key(3))),
        {},
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_of_which_nothing_is_converted_is_refused(model):
    message = r"model must have an equinox\.nn\.MultiheadAttention in it.* subclasses stay"
    with pytest.raises(ValueError, match=f"{message}.*; it is {type(model).__name__} without one"):
        flash_jax.equinox.from_equinox(model)


def test_the_constructor_draws_the_same_weights_and_files_load():
    theirs, file = layer(), io.BytesIO()
    new = functools.partial(flash_jax.equinox.MultiheadAttention, N, D)
    assert eqx.tree_equal(new(key=jax.random.key(0)), flash_jax.equinox.from_equinox(theirs))
    eqx.tree_serialise_leaves(file, theirs)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, new(key=jax.random.key(1)))
    assert eqx.tree_equal(loaded, flash_jax.equinox.from_equinox(theirs))


def test_dropout_is_as_inference_says(rng):
    model, x = flash_jax.equinox.from_equinox(layer(dropout_p=0.5)), random(rng, T, D)
    for options in ({}, {"inference": False}, {"deterministic": False}):
        with pytest.raises(RuntimeError, match="key must be given"):
            model(x, x, x, **options)
    expected = model(x, x, x, inference=True)
    np.testing.assert_array_equal(model(x, x, x, deterministic=True), expected)
    np.testing.assert_array_equal(eqx.nn.inference_mode(model)(x, x, x), expected)


def test_heads_of_another_shape_raise():
    model, x = flash_jax.equinox.from_equinox(layer()), jnp.ones((T, D))
    with pytest.raises(ValueError, match="process_heads must keep the shapes"):
        model(x, x, x, process_heads=lambda q, k, v: (q[:1], k, v))
    with pytest.raises(ValueError, match="mask must broadcast"):
        model(x, x, x, mask=np.ones((T, T + 1), bool))
