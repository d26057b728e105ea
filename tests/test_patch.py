"""jax.nn.dot_product_attention, replaced for a while."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import flash_jax
from flash_jax import patch_jax_nn

THEIRS = jax.nn.dot_product_attention


def patched():
    return jax.nn.dot_product_attention is flash_jax.dot_product_attention


def test_it_is_ours_within_and_theirs_after():
    with patch_jax_nn():
        assert patched()
        with patch_jax_nn():
            assert patched()
        assert patched()
    assert jax.nn.dot_product_attention is THEIRS


def test_exceptions_restore_it():
    with pytest.raises(KeyError), patch_jax_nn():
        raise KeyError
    assert jax.nn.dot_product_attention is THEIRS


def test_as_a_decorator():
    decorated = patch_jax_nn()(patched)
    assert decorated()
    assert decorated()
    assert not patched()


def test_what_another_put_there_comes_back(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", sum)
    with patch_jax_nn():
        assert patched()
    assert jax.nn.dot_product_attention is sum


def test_it_reaches_the_layer_of_flax():
    """Of rows that read no key ours makes zero, and theirs the mean of the values."""
    layer = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    x, mask = jnp.arange(24.0).reshape(2, 3, 4), np.zeros((2, 1, 3, 3), bool)
    with patch_jax_nn():
        np.testing.assert_array_equal(layer(x, mask=mask), 0)
    assert np.all(layer(x, mask=mask) != 0)
