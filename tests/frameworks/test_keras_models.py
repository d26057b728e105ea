"""Models of Keras whose layers hold the attention, as those of KerasHub do."""

import jax
import keras
import numpy as np
from jax import export
from keras_layers import MARKS, Block, D, T, gqa, little_optimization, mha, spy

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
