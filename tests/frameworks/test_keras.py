"""The layers of Keras: as with Keras's own core, on the same weights."""

import functools
from unittest import mock

import jax
import keras
import numpy as np
import pytest
from jax import export
from jax import numpy as jnp
from layers import assert_same, dropout_factors, padding, random, random_params
from oracle import max_error

import flash_jax.keras
from flash_jax.keras import use_flash_attention, use_keras_attention

B, T, S, N, K, H, D = 2, 7, 11, 6, 3, 4, 9

pytestmark = [
    # Keras's variables as NumPy arrays: NumPy wants another signature of their __array__.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # GroupQueryAttention hands inputs that carry a mask to projections that know no masks.
    pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning"),
]


@pytest.fixture(autouse=True)
def _little_optimization():
    """Here arithmetic is compared, and XLA's compiler would take most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


mha = functools.partial(keras.layers.MultiHeadAttention, N, H)
gqa = functools.partial(keras.layers.GroupQueryAttention, H, N, K)


def build(layer, query=(B, T, D), value=(B, S, D), key=None, **options):
    """A layer, and shapes of its weights; a float64 one where a test compares in float64."""
    with jax.enable_x64(True):
        layer = layer(**{"dtype": "float64", "bias_initializer": "random_normal", **options})
        layer.build(query, value, value if key is None else key)
    return layer


def weights(layer):
    return [np.asarray(x.value) for x in layer.trainable_variables]


def function(layer, change, **call):
    """The layer as a function of its weights and inputs, with the core that change puts in."""

    def apply(params, *inputs):
        change(layer)
        state = [x.value for x in layer.non_trainable_variables]
        return layer.stateless_call(params, state, *inputs, **call)[0]

    return apply


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
    "gqa": gqa,
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
    "gqa": lambda rng: {"use_causal_mask": True, "attention_mask": padding(rng, B, 1, S)},
    "gqa with a gate and a window": lambda rng: {
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


@pytest.mark.parametrize("layer", [mha, gqa], ids=["mha", "gqa"])
def test_without_dropout_empty_rows_are_the_mean(layer, rng):
    """There Keras's core is that of jax.nn, whose softmax is float32."""
    layer = build(layer)
    inputs = random(rng, B, T, D), random(rng, B, S, D)
    kept = {"value_mask": np.arange(S) < np.array([[5], [0]])}
    assert_same_as_keras(layer, inputs, np.float32, "mean", use_causal_mask=True, **kept)


@pytest.mark.parametrize("layer", [mha, gqa], ids=["mha", "gqa"])
def test_dropout(layer, rng):
    """Keras's core with the same probabilities dropped, of the next seed of the layer."""
    layer = build(layer, dropout=0.3, seed=5)
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


# Models whose layers hold the attention, as those of KerasHub do.


class Block(keras.layers.Layer):
    """Attention of normalized inputs, and a path around it."""

    def __init__(self, attention, causal=False, **options):
        super().__init__(**options)
        self.supports_masking = True
        self.attention, self.causal = attention, causal
        self.norm = keras.layers.LayerNormalization()

    def build(self, shape):
        self.attention.build(shape, shape)
        self.norm.build(shape)

    def call(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, use_causal_mask=self.causal)


def language_model(*blocks):
    """A model of tokens with a mask of padding; batch size and length are unknown."""
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(13, D, mask_zero=True)(ids)
    for block in blocks:
        x = block(x)
    model = keras.Model(ids, keras.layers.Dense(13)(x))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(True))
    return model


def tokens(rng, T=T):
    """Padded at the end with 0."""
    ids = rng.integers(1, 13, (4, T))
    return np.where(np.arange(T) < np.array([[T], [5], [3], [1]]), ids, 0).astype(np.int32)


def losses(model, ids, start):
    """Of three steps from these values of the model's variables."""
    for variable, x in zip(model.variables, start, strict=True):
        variable.assign(x)
    return model.fit(ids, ids, batch_size=4, epochs=3, shuffle=False, verbose=0).history["loss"]


def spy():
    """Counts the calls of the core."""
    return mock.patch.object(flash_jax.keras, "attend", wraps=flash_jax.keras.attend)


def test_fit_predict_and_what_was_compiled_before(rng):
    model, ids = language_model(Block(mha()), Block(gqa(), causal=True)), tokens(rng)
    start = [np.asarray(x.value) for x in model.variables]
    expected, own = losses(model, ids, start), model.predict(ids, verbose=0)
    use_flash_attention(model)
    with spy() as attend:
        np.testing.assert_allclose(losses(model, ids, start), expected, rtol=1e-5)
        fitted = attend.call_count
        ours = model.predict(ids, verbose=0)
    assert 0 < fitted < attend.call_count
    np.testing.assert_allclose(ours[ids > 0], own[ids > 0], atol=1e-5)


def test_a_model_with_dropout_trains(rng):
    model, ids = language_model(Block(mha(dropout=0.2, seed=3), causal=True)), tokens(rng)
    start = [np.asarray(x.value) for x in model.variables]
    use_flash_attention(model)
    first = losses(model, ids, start)
    assert losses(model, ids, start) == first  # the states of the seed generators are variables
    assert first[-1] < first[0]


@pytest.mark.parametrize(("sizes", "lengths"), [("b, 7", (7, 7)), ("b, t", (263, 5))])
def test_an_exported_model_takes_every_size(sizes, lengths, rng):
    """Exported once, and run at two batch sizes; with Keras's core the results are the same."""
    model = language_model(Block(mha(), causal=True), Block(gqa()))
    variables = model.trainable_variables, model.non_trainable_variables
    state = [[x.value for x in group] for group in variables]

    def call(ids):
        return model.stateless_call(*state, ids)[0]

    use_flash_attention(model)
    spec = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), "int32")
    with spy() as attend:
        exported = export.deserialize(export.export(jax.jit(call))(spec).serialize())
    assert attend.call_count == 2
    batches = [tokens(rng, length)[:size] for size, length in zip((4, 2), lengths, strict=True)]
    outputs = [jax.jit(exported.call)(ids) for ids in batches]
    use_keras_attention(model)
    for ids, out in zip(batches, outputs, strict=True):
        expected = jax.jit(lambda ids: call(ids))(ids)  # call itself has been traced
        np.testing.assert_allclose(out[ids > 0], expected[ids > 0], atol=1e-5)


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
def test_no_array_is_of_queries_by_keys(layer):
    """Causal, with a window and padding, forward and backward."""
    layer, T = build(layer, dtype="float32", sliding_window=500), 2**14

    def loss(params, x, kept):
        call = {"use_causal_mask": True, "value_mask": kept}
        return jnp.sum(function(layer, use_flash_attention, **call)(params, x, x))

    x, kept = jax.ShapeDtypeStruct((1, T, D), "float32"), jax.ShapeDtypeStruct((1, T), bool)
    compiled = jax.jit(jax.grad(loss)).lower(weights(layer), x, kept).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T**2 / 4
