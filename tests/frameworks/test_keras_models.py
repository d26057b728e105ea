"""Models of Keras whose layers hold the attention, as those of KerasHub do."""

import jax
import keras
import numpy as np
from jax import export
from keras_layers import MARKS, Block, D, H, N, T, gqa, little_optimization, mha, spy

from flash_jax.keras import use_flash_attention, use_keras_attention

pytestmark = MARKS
__all__ = ["little_optimization"]  # a fixture


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


def test_an_exported_model_takes_every_size(rng):
    """Exported once, and run at two sizes; with Keras's core the results are the same."""
    model = language_model(Block(mha(), causal=True), Block(gqa()))
    variables = model.trainable_variables, model.non_trainable_variables
    state = [[x.value for x in group] for group in variables]

    def call(ids):
        return model.stateless_call(*state, ids)[0]

    use_flash_attention(model)
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("b, t"), "int32")
    with spy() as attend:
        exported = export.deserialize(export.export(jax.jit(call))(spec).serialize())
    assert attend.call_count == 2
    batches = [tokens(rng, length)[:size] for size, length in ((4, 263), (2, 5))]
    outputs = [jax.jit(exported.call)(ids) for ids in batches]
    use_keras_attention(model)
    for ids, out in zip(batches, outputs, strict=True):
        expected = jax.jit(lambda ids: call(ids))(ids)  # call itself has been traced
        np.testing.assert_allclose(out[ids > 0], expected[ids > 0], atol=1e-5)


class Cached(keras.layers.MultiHeadAttention):
    """As KerasHub's: keys and values are written into a cache (B, 2, S, N, H), which is read."""

    def call(self, x, cache, index):
        start = [0, index, 0, 0]
        updates = self._key_dense(x), self._value_dense(x)
        key, value = (
            keras.ops.slice_update(cache[:, i], start, new) for i, new in enumerate(updates)
        )
        written, read = keras.ops.arange(x.shape[1]) + index, keras.ops.arange(cache.shape[2])
        mask = (read[None] <= written[:, None])[None]
        out, _ = self._compute_attention(self._query_dense(x), key, value, attention_mask=mask)
        return self._output_dense(out), keras.ops.stack((key, value), axis=1)


def test_a_model_that_generates_with_its_own_cache(rng):
    """As KerasHub's ``generate``: a prompt, and then a loop of one token at a time."""
    embed, layer = keras.layers.Embedding(13, D), Cached(N, H)
    embed.build((1, T))
    layer.build((1, T, D), (1, T, D))
    prompt, S = rng.integers(1, 13, (3, 5)).astype(np.int32), 17

    def read(ids, cache, index):
        x = embed(ids)
        y, cache = layer(x, cache=cache, index=index)
        logits = keras.ops.matmul((x + 3 * y)[:, -1], keras.ops.transpose(embed.embeddings))
        return keras.ops.argmax(logits, axis=-1).astype("int32"), cache

    def generate():
        cache = keras.ops.zeros((3, 2, S, N, H))
        token, cache = read(prompt, cache, 0)
        ids = keras.ops.slice_update(keras.ops.zeros((3, S), "int32"), [0, 0], prompt)

        def step(index, token, ids, cache):
            ids = keras.ops.slice_update(ids, [0, index], token[:, None])
            token, cache = read(token[:, None], cache, index)
            return index + 1, token, ids, cache

        state = keras.ops.convert_to_tensor(5), token, ids, cache
        return keras.ops.while_loop(lambda index, *_: index < S, step, state)[2]

    expected = jax.jit(generate)()
    use_flash_attention(layer)
    with spy() as attend:
        ids = jax.jit(lambda: generate())()  # generate itself has been traced
    assert attend.call_count == 2
    np.testing.assert_array_equal(ids, expected)
    assert len(np.unique(ids)) > 3
