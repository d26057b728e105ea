"""attention_fn of Flax: as Flax's own, with every keyword that its layers pass."""

import functools

import jax
import numpy as np
import pytest
from flax import linen, nnx
from flax_layers import EPS, B, D, H, N, S, T, linen_layer, nnx_layer
from jax import numpy as jnp
from layers import (
    as_array,
    assert_close,
    assert_same,
    dropout_factors,
    padding,
    random,
    random_params,
)
from sizes import largest_array

import flash_jax
from flash_jax import linen_attention_fn, nnx_attention_fn


def nnx_function(attention_fn, options, call):
    layer = nnx.eval_shape(lambda: nnx_layer(attention_fn, **options))
    graph, params = nnx.split(layer)
    return params, lambda params, *inputs: nnx.merge(graph, params)(*inputs, **call)


# The layer's options, the batch axes of its input, and what it is called with.
NNX = {
    "without batch": (
        {"dropout_rate": 0.5, "deterministic": True, "use_bias": False},
        (),
        lambda rng: {"mask": padding(rng, N, T, T).astype(int)},
    ),
    "is_causal and grouped heads": (
        {"num_kv_heads": 2},
        (B,),
        lambda rng: {"is_causal": True, "mask": padding(rng, B, 1, T, T)},
    ),
    "dtype": ({"dtype": jnp.bfloat16}, (B,), lambda rng: {}),
    "precision": (
        {"precision": "highest", "normalize_qk": True},
        (B,),
        lambda rng: {"mask": nnx.make_causal_mask(np.ones((B, T)))},
    ),
}


@pytest.mark.parametrize(("options", "batch", "call"), NNX.values(), ids=NNX)
def test_the_layer_of_nnx(options, batch, call, rng):
    call = call(rng)
    params, ours = nnx_function(nnx_attention_fn, options, call)
    their_params, theirs = nnx_function(nnx.dot_product_attention, options, call)
    assert params == their_params
    params, inputs = random_params(rng, params), (random(rng, *batch, T, D),)
    dtype = options.get("dtype", np.float64)
    # Without dropout NNX calls jax.nn, whose softmax is float32 always.
    rounding = None if dtype == jnp.bfloat16 else np.float32
    assert_same(ours, theirs, params, inputs, dtype, rounding)


LINEN = {
    "batch axes": (
        {"dropout_rate": 0.5, "precision": jax.lax.Precision.HIGH},
        (B, 3),
        lambda rng: {"mask": padding(rng, B, 1, 1, T, S), "deterministic": True},
    ),
    "Mask": ({}, (B,), lambda rng: {"mask": flash_jax.PrefixMask(3) | flash_jax.CausalMask()}),
    "dtype": (
        {"dtype": jnp.bfloat16, "force_fp32_for_softmax": True},
        (B,),
        lambda rng: {"mask": padding(rng, N, T, S)},
    ),
}


@pytest.mark.parametrize(("options", "batch", "call"), LINEN.values(), ids=LINEN)
def test_the_layer_of_linen(options, batch, call, rng):
    inputs, call = (random(rng, *batch, T, D), random(rng, *batch, S, D)), call(rng)
    their_call = call | {"mask": as_array(call.get("mask"), N, T, S)}
    layer, their_layer = linen_layer(linen_attention_fn, **options), linen_layer(**options)
    init = functools.partial(layer.init, **call), functools.partial(their_layer.init, **their_call)
    params, their_params = (jax.eval_shape(f, jax.random.key(0), *inputs) for f in init)
    assert params == their_params
    ours = functools.partial(layer.apply, **call)
    theirs = functools.partial(their_layer.apply, **their_call)
    params, dtype = random_params(rng, params), options.get("dtype", np.float64)
    assert_same(ours, theirs, params, inputs, dtype)


BIASES = {
    "of keys": (S,),
    "of one batch axis": (B, 1, N, 1, S),
}


@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_a_bias_beside_a_mask(shape, rng):
    batch = shape[:-3] if len(shape) == 4 else (B, 3)
    qkv = (random(rng, *batch, T, N, H), *(random(rng, *batch, S, N, H) for _ in range(2)))
    mask = padding(rng, *shape)

    def function(attention_fn):
        return lambda bias, *qkv: attention_fn(*qkv, bias, mask)

    ours, theirs = function(nnx_attention_fn), function(linen.dot_product_attention)
    assert_same(ours, theirs, random(rng, *shape), qkv)


def test_decoding_of_nnx_step_by_step(rng):
    """With a mask, which the layer combines with that of its cache."""
    mask = np.broadcast_to(np.arange(S) != 1, (B, N, 1, S))
    layers = nnx_layer(nnx_attention_fn), nnx_layer()
    for layer in layers:
        layer.init_cache((B, S, D))
    step = nnx.jit(lambda layer, x: layer(x, mask=mask, decode=True))
    for _ in range(4):
        x = random(rng, B, 1, D)
        out, expected = (step(layer, x) for layer in layers)
        assert_close([out], [expected], EPS)
    caches, expected = (nnx.state(layer, nnx.Cache) for layer in layers)
    assert caches["cache_index"][...] == 4
    jax.tree.map(np.testing.assert_array_equal, caches, expected)


def test_decoding_of_linen_step_by_step(rng):
    """With the mask of the cache alone."""
    layers = linen_layer(linen_attention_fn, decode=True), linen_layer(decode=True)
    variables = [layer.init(jax.random.key(0), random(rng, B, S, D)) for layer in layers]
    steps = [jax.jit(functools.partial(layer.apply, mutable="cache")) for layer in layers]
    for _ in range(4):
        x = random(rng, B, 1, D)
        results = [step(state, x) for step, state in zip(steps, variables, strict=True)]
        (out, _), (expected, _) = results
        assert_close([out], [expected], EPS)
        variables = [state | cache for state, (_, cache) in zip(variables, results, strict=True)]
    assert variables[0]["cache"]["cache_index"] == 4
    jax.tree.map(np.testing.assert_array_equal, *variables)


def test_dropout(rng):
    """The plain formula with the same probabilities dropped, of which each is dropped alone."""
    key, rate = jax.random.key(3), 0.3
    factors = dropout_factors(key, rate, B, T, N, S)
    dropped = factors == 0
    deviation = np.sqrt(dropped.size * rate * (1 - rate))
    assert abs(np.sum(dropped) - rate * dropped.size) < 5 * deviation
    assert np.any(dropped[0] != dropped[1])
    assert np.any(dropped[:, 0] != dropped[:, 1])

    def ours(_, *qkv):
        return linen_attention_fn(*qkv, dropout_rng=key, dropout_rate=rate, broadcast_dropout=False)

    def plain(_, query, key, value):
        weights = linen.dot_product_attention_weights(query, key, deterministic=True)
        return jnp.einsum("bnts,bsnh->btnh", weights * factors.astype(query.dtype), value)

    qkv = random(rng, B, T, N, H), random(rng, B, S, N, H), random(rng, B, S, N, H)
    assert_same(ours, plain, (), qkv)


def with_defaults_of_nnx(attention_fn):
    layer = nnx.eval_shape(lambda: nnx_layer(attention_fn, dropout_rate=0.4))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def function(params, x):
        layer = nnx.merge(graph, params, rest)
        return layer(x, deterministic=False, rngs=nnx.Rngs(dropout=5))

    return params, function


def with_defaults_of_linen(attention_fn):
    layer = linen_layer(attention_fn, dropout_rate=0.4, deterministic=False)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(5)}
    params = jax.eval_shape(layer.init, keys, jnp.ones((B, T, D)))
    return params, functools.partial(layer.apply, rngs=keys)


@pytest.mark.parametrize(
    ("attention_fn", "function"),
    [(nnx_attention_fn, with_defaults_of_nnx), (linen_attention_fn, with_defaults_of_linen)],
    ids=["nnx", "linen"],
)
def test_layers_with_the_defaults_of_flax_drop_the_same_everywhere(attention_fn, function, rng):
    """Beside the plain formula, with the factors that the key of the layer gives."""
    keys, x = [], random(rng, B, T, D)

    def ours(*qkv, dropout_rng, dropout_rate, broadcast_dropout, **options):
        assert (dropout_rate, broadcast_dropout) == (0.4, True)
        keys.append(dropout_rng)
        return attention_fn(*qkv, dropout_rng=dropout_rng, dropout_rate=dropout_rate, **options)

    params, call = function(ours)
    params = random_params(rng, params)
    call(params, x)
    factors = dropout_factors(keys[-1], 0.4, B, T, N, T, broadcast_dropout=True)
    np.testing.assert_array_equal(factors, np.broadcast_to(factors[0, 0], factors.shape))

    def plain(query, key, value, **_):
        weights = linen.dot_product_attention_weights(query, key, deterministic=True)
        return jnp.einsum("bnts,bsnh->btnh", weights * factors.astype(weights.dtype), value)

    assert_same(call, function(plain)[1], params, (x,))


def test_layers_draw_dropout_from_their_streams(rng):
    x, options = random(rng, B, T, D), {"dropout_rate": 0.5, "broadcast_dropout": False}
    layer = nnx_layer(nnx_attention_fn, **options)
    once, again = layer(x, deterministic=False), layer(x, deterministic=False)
    assert np.any(once != again)
    same = nnx_layer(nnx_attention_fn, **options)(x, deterministic=False)
    np.testing.assert_array_equal(once, same)

    layer = linen_layer(linen_attention_fn, deterministic=False, **options)
    params = layer.init(jax.random.key(0), x)
    once, again, other = (
        layer.apply(params, x, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)


def test_no_array_of_the_layer_is_longer_than_the_queries():
    """Causal, forward and backward: the largest are queries, keys and values."""
    graph, params = nnx.split(nnx_layer(nnx_attention_fn))

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x, is_causal=True))

    x = jax.ShapeDtypeStruct((1, 2**14, D), np.float32)
    assert largest_array(jax.grad(loss), params, x) == 2**14 * N * H
