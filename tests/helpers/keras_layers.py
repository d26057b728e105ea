"""Layers of Keras as functions of their weights, with either core."""

import functools
from unittest import mock

import jax
import keras
import numpy as np
import pytest

import flash_jax.keras

B, T, S, N, K, H, D = 2, 7, 11, 6, 3, 4, 9

MARKS = [
    pytest.mark.usefixtures("little_optimization"),
    # Keras's variables as NumPy arrays: NumPy wants another signature of their __array__.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # GroupQueryAttention hands inputs that carry a mask to projections that know no masks.
    pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning"),
]


@pytest.fixture
def little_optimization():
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


def spy():
    """Counts the calls of the core."""
    return mock.patch.object(flash_jax.keras, "attend", wraps=flash_jax.keras.attend)


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
