"""The layer of Haiku: as Haiku's own, of its parameters."""

import haiku as hk
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from layers import as_array, assert_same, padding, random, random_params

import flash_jax
import flash_jax.haiku

B, T, S, N, H, D = 2, 7, 11, 3, 5, 13


def model(layer, mask=None, **options):
    init = hk.initializers.VarianceScaling()
    return hk.without_apply_rng(
        hk.transform(lambda *inputs: layer(N, H, w_init=init, **options)(*inputs, mask))
    )


CASES = {
    "Mask": ({"with_bias": False}, (), lambda rng: flash_jax.CausalMask()),
    "sizes": ({"value_size": 4, "model_size": 9}, (B,), lambda rng: padding(rng, B, N, T, S)),
    "batch axes": (
        {"b_init": hk.initializers.RandomNormal(), "name": "attention"},
        (B, 3),
        lambda rng: padding(rng, B, 1, 1, T, S).astype(np.float32),
    ),
}


@pytest.mark.parametrize(("options", "batch", "mask"), CASES.values(), ids=CASES)
def test_the_layer(options, batch, mask, rng):
    x, y, z = random(rng, *batch, T, D), random(rng, *batch, S, D), random(rng, *batch, S, 6)
    mask = mask(rng)
    ours = model(flash_jax.haiku.MultiHeadAttention, mask, **options)
    theirs = model(hk.MultiHeadAttention, as_array(mask, N, T, S), **options)
    params, their_params = (
        jax.eval_shape(f.init, jax.random.key(0), x, y, z) for f in (ours, theirs)
    )
    assert params == their_params
    assert_same(ours.apply, theirs.apply, random_params(rng, params), (x, y, z))


def test_parameters_are_drawn_in_the_same_order():
    x = jnp.ones((1, 1))
    params, their_params = (
        model(layer).init(jax.random.key(0), x, x, x)
        for layer in (flash_jax.haiku.MultiHeadAttention, hk.MultiHeadAttention)
    )
    jax.tree.map(np.testing.assert_array_equal, params, their_params)


def test_a_mask_that_does_not_fit_raises():
    x = jnp.ones((B, T, D))
    with pytest.raises(ValueError, match="mask must broadcast"):
        model(flash_jax.haiku.MultiHeadAttention, np.ones((B, 2, T, T))).init(
            jax.random.key(0), x, x, x
        )
