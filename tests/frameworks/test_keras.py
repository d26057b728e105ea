"""The layers of Keras: as with Keras's own core, on the same weights."""

import functools
from unittest import mock

import jax
import keras
import numpy as np
import pytest
from jax import numpy as jnp
from keras_layers import (
    MARKS,
    B,
    Block,
    D,
    H,
    K,
    N,
    S,
    T,
    build,
    function,
    gqa,
    little_optimization,
    mha,
    spy,
    weights,
)
from layers import assert_same, dropout_factors, padding, random, random_params
from oracle import max_error
from sizes import largest_array

from flash_jax.keras import use_flash_attention, use_keras_attention

pytestmark = MARKS
__all__ = ["little_optimization"]  # a fixture


def assert_same_as_keras(layer, inputs, rounding=None, empty_rows="zero", **call):
    ours = function(layer, functools.partial(use_flash_attention, empty_rows=empty_rows), **call)
    theirs = function(layer, use_keras_attention, **call)
    params = random_params(np.random.default_rng(1), weights(layer))
    assert_same(ours, theirs, params, inputs, rounding=rounding)


LAYERS = {
    "mha": functools.partial(mha, value_dim=5, output_shape=8),
    "mha with a gate and no biases": functools.partial(
        mha, use_gate=True, value_dim=3, use_bias=False
    ),
    "mha with a window": functools.partial(mha, sliding_window=3),
    "gqa with a gate and a window": functools.partial(gqa, use_gate=True, sliding_window=2),
}
CALLS = {
    "mha": lambda rng: {"attention_mask": padding(rng, B, T, S)},
    "mha with a gate and no biases": lambda rng: {
        "attention_mask": padding(rng, B, N, T, S).astype(int)
    },
    "mha with a window": lambda rng: {
        "use_causal_mask": True,
        "value_mask": padding(rng, B, S),
        "key_mask": padding(rng, B, S),
        "attention_mask": padding(rng, T, S),
    },
    "gqa with a gate and a window": lambda rng: {
        "attention_mask": padding(rng, B, 1, S),
        "query_mask": padding(rng, B, T),
        "value_mask": padding(rng, B, S),
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer(name, rng):
    """With dropout, here inactive, Keras's core is float64 throughout, and empty rows are zero."""
    layer = build(LAYERS[name], key=(B, S, 5) if "mha" in name else None, dropout=0.5)
    inputs = (
        random(rng, B, T, D),
        random(rng, B, S, D),
        random(rng, B, S, 5 if "mha" in name else D),
    )
    assert_same_as_keras(layer, inputs, **CALLS[name](rng))


def test_without_dropout_empty_rows_are_the_mean(rng):
    """There Keras's core is that of jax.nn, whose softmax is float32."""
    layer = build(gqa)
    inputs = random(rng, B, T, D), random(rng, B, S, D)
    kept = {"value_mask": np.arange(S) < np.array([[5], [0]])}
    assert_same_as_keras(layer, inputs, np.float32, "mean", use_causal_mask=True, **kept)


def test_dropout(rng):
    """Keras's core with the same probabilities dropped, of the next seed of the layer."""
    layer = build(gqa, dropout=0.3, seed=5)
    generator = layer._dropout_layer.seed_generator
    key = jax.random.wrap_key_data(jnp.asarray(generator.state.value, "uint32"))
    factors = dropout_factors(key, 0.3, B, T, N, S)
    assert np.any(factors == 0)
    drop = mock.Mock(side_effect=lambda x, training: x * jnp.asarray(factors, x.dtype))

    def own(layer):
        use_keras_attention(layer)
        layer._dropout_layer.call = drop

    call = {"use_causal_mask": True, "training": True}
    ours, theirs = function(layer, use_flash_attention, **call), function(layer, own, **call)
    inputs = random(rng, B, T, D), random(rng, B, S, D)
    assert_same(ours, theirs, random_params(rng, weights(layer)), inputs)
    assert drop.called


def test_dropout_is_that_of_the_seed(rng):
    layer = use_flash_attention(build(mha, dropout=0.5, seed=5, dtype="float32"))
    x, y = random(rng, B, T, D), random(rng, B, S, D)
    state = layer._dropout_layer.seed_generator.state
    start = np.asarray(state.value)
    first, second = layer(x, y, training=True), layer(x, y, training=True)
    state.assign(start)
    np.testing.assert_array_equal(layer(x, y, training=True), first)
    assert np.any(first != second)


@pytest.mark.parametrize(
    ("layer", "policy"),
    [(mha, "mixed_bfloat16"), (gqa, "mixed_float16")],
    ids=["mha in bfloat16", "gqa in float16"],
)
def test_mixed_precision(layer, policy, rng):
    """Twice the error of Keras's core at the most, against a layer in float32."""
    layer, exact = build(layer, dtype=policy), build(layer, dtype="float32")
    exact.set_weights(layer.get_weights())
    x, y = random(rng, B, T, D), random(rng, B, S, D)
    expected, theirs = (f(x, y, use_causal_mask=True) for f in (exact, layer))
    ours = use_flash_attention(layer)(x, y, use_causal_mask=True)
    assert ours.dtype == theirs.dtype == layer.compute_dtype
    eps = float(jnp.finfo(ours.dtype).eps)
    assert max_error(ours, expected) <= 2 * max_error(theirs, expected) + eps


# Which layers, and when not.


class Cached(keras.layers.MultiHeadAttention):
    """As KerasHub's: Keras's core, called by a ``call`` of its own with a mask of its own."""

    def call(self, query, value, attention_mask=None, training=None):
        projected = self._query_dense(query), self._key_dense(value), self._value_dense(value)
        out, _ = self._compute_attention(
            *projected, attention_mask=attention_mask, training=training
        )
        return self._output_dense(out)


class Grouped(keras.layers.Layer):
    """As KerasHub's Gemma: a core of its own that takes ``keras.ops.dot_product_attention``."""

    dropout = 0.0
    logits_soft_cap = 2.0

    def _use_fused_attention_op(self):
        return False

    def _compute_attention(self, query, key, attention_mask):
        if self._use_fused_attention_op():
            options = {"scale": 0.3, "attn_logits_soft_cap": self.logits_soft_cap}
            return keras.ops.dot_product_attention(
                query, key, key, mask=attention_mask[:, None], **options
            )
        query = query.reshape(B, -1, K, N // K, H)
        scores = jnp.einsum("btkgh,bskh->bkgts", query, key) * 0.3
        scores = self.logits_soft_cap * jnp.tanh(scores / self.logits_soft_cap)
        scores = jnp.where(attention_mask[:, None, None], scores, -1e9)
        out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), key)
        return out.reshape(B, -1, N, H)

    def call(self, x, y, attention_mask):
        return self._compute_attention(x, y, attention_mask)


def test_a_subclass_that_keeps_the_core(rng):
    layer = build(functools.partial(Cached, N, H), dropout=0.5)
    inputs = random(rng, B, T, D), random(rng, B, S, D)
    assert_same_as_keras(layer, inputs, attention_mask=padding(rng, B, T, S))


def test_a_layer_that_takes_the_op(rng):
    layer = Grouped(dtype="float64")
    layer.built = True
    inputs = random(rng, B, T, N, H), random(rng, B, S, K, H)
    assert_same_as_keras(layer, inputs, attention_mask=padding(rng, B, T, S))
    theirs = keras.ops.dot_product_attention
    layer = Grouped(dtype="float32")
    layer.dropout = 0.1
    with pytest.warns(UserWarning, match="keeps its own attention: here it does not call"):
        use_flash_attention(layer)(*inputs, attention_mask=np.ones((B, T, S), bool))
    assert keras.ops.dot_product_attention is theirs


def test_what_is_not_offered_keeps_the_attention_of_keras(rng):
    x, y = random(rng, B, T, D), random(rng, B, S, D)
    calls = [
        (build(mha, dtype="float32"), {"value_mask": padding(rng, B, S)}, (x, y)),
        (build(gqa, dtype="float32"), {"use_causal_mask": True}, (x, y)),
    ]
    for layer, call, inputs in calls:
        call = call | {"return_attention_scores": True}
        expected = layer(*inputs, **call)
        with pytest.warns(UserWarning, match="keeps Keras's attention: return_attention_scores"):
            out = use_flash_attention(layer)(*inputs, **call)
        jax.tree.map(np.testing.assert_array_equal, out, expected)
    images = random(rng, B, 3, 5, D)
    layer = build(mha, images.shape, images.shape, dtype="float32")
    expected = layer(images, images)
    with pytest.warns(UserWarning, match=r"must be \(1,\) of inputs of 3 axes; they are \(1, 2\)"):
        np.testing.assert_array_equal(use_flash_attention(layer)(images, images), expected)


def test_keras_infers_shapes_through_the_core():
    """In a new functional model, with a batch size and lengths that are unknown."""
    x, heads = keras.Input((None, D)), keras.Input((None, N, H))
    kept = keras.Input((None, None), dtype="bool")
    for layer in (mha(sliding_window=3, dropout=0.2), gqa()):
        block = Block(layer, causal=True)
        block.build(x.shape)
        use_flash_attention(block)
        with spy() as attend:
            assert block(x).shape == (None, None, D)
        assert attend.call_count == 1
    layer = Grouped()
    layer.built = True
    with spy() as attend:
        out = use_flash_attention(layer)(heads, keras.Input((None, K, H)), kept)
    assert out.shape == (None, None, N, H)
    assert attend.call_count == 1


def test_a_saved_model_is_one_of_keras(tmp_path, rng):
    x = keras.Input((T, D))
    model = use_flash_attention(keras.Model(x, mha()(x, x, use_causal_mask=True)))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = random(rng, B, T, D)
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)
    assert not any("_compute_attention" in vars(layer) for layer in loaded.layers)


def test_errors(monkeypatch):
    for model in (keras.layers.Dense(3), keras.Sequential([keras.layers.Dense(3)])):
        with pytest.raises(ValueError, match=rf"GroupQueryAttention.*'{model.name}' has none"):
            use_flash_attention(model)
    with pytest.raises(ValueError, match="empty_rows must be"):
        use_flash_attention(mha(), empty_rows="one")
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match=r"must be 'jax' \(KERAS_BACKEND=jax .* it is 'torch'"):
        use_flash_attention(mha())


# Memory.


@pytest.mark.parametrize("layer", [mha, gqa], ids=["mha", "gqa"])
def test_no_array_is_longer_than_the_queries(layer):
    """Causal, with a window and padding, forward and backward: the largest are the queries."""
    layer = build(layer, dtype="float32", sliding_window=500)

    def loss(params, x, kept):
        call = {"use_causal_mask": True, "value_mask": kept}
        return jnp.sum(function(layer, use_flash_attention, **call)(params, x, x))

    x, kept = jax.ShapeDtypeStruct((1, 2**14, D), "float32"), jax.ShapeDtypeStruct((1, 2**14), bool)
    assert largest_array(jax.grad(loss), weights(layer), x, kept) == 2**14 * N * H
