"""Layers of a framework and of flash_jax, on the same parameters: outputs and every gradient.

They are compared in float64, where no difference hides behind rounding.
"""

import jax
import numpy as np
from jax import numpy as jnp
from oracle import max_error
from unoptimized import UNOPTIMIZED

import flash_jax


def random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def padding(rng, *shape):
    """A mask that keeps the first key, so that every row reads one: there frameworks agree."""
    return (rng.random(shape) < 0.6) | (np.arange(shape[-1]) == 0)


def as_array(mask, *shape):
    """What a framework takes in place of a mask: a ``Mask`` as an array (N, T, S)."""
    if isinstance(mask, flash_jax.Mask):
        return np.broadcast_to(mask.to_array(*shape[1:]), shape)
    return mask


def random_params(rng, shapes):
    """Parameters, biases too, of these shapes; so small that no softmax picks a single key."""
    return jax.tree.map(lambda x: random(rng, *x.shape) / 4, shapes)


def assert_same(ours, theirs, params, inputs, dtype=np.float64, rounding=None):
    """Compares layer functions (params, *inputs) -> out of dtype, with their gradients.

    Args:
        rounding: the dtype that differences are measured by, where some step in theirs has fewer
            digits than dtype.
    """
    with jax.enable_x64(True):
        params, inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, inputs))
        results = [jax.tree.map(np.asarray, _run(f, params, inputs)) for f in (ours, theirs)]
    (out, gradients), (their_out, their_gradients) = results
    assert out.dtype == their_out.dtype == dtype
    assert jax.tree.structure(gradients) == jax.tree.structure(their_gradients)
    eps = float(jnp.finfo(rounding or dtype).eps)
    assert_close([out], [their_out], eps)
    assert_close(jax.tree.leaves(gradients), jax.tree.leaves(their_gradients), eps)


def _run(layer, params, inputs):
    def loss(params, inputs):
        out = layer(params, *inputs)
        weights = jnp.cos(jnp.arange(out.size, dtype=np.float32)).reshape(out.shape)
        return jnp.sum(out * weights.astype(out.dtype)), out

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=UNOPTIMIZED)
    (_, out), gradients = both(params, inputs)
    return out, gradients


def assert_close(arrays, expected, eps):
    """An entry may differ by 8 eps, relative to the largest of all."""
    expected = [np.asarray(x, np.float64) for x in expected]
    bound = 8 * eps * max(np.max(np.abs(x)) for x in expected)
    for x, y in zip(arrays, expected, strict=True):
        assert x.shape == y.shape
        assert max_error(x, y) <= bound


def dropout_factors(rng, rate, B, T, N, S, **options):
    """What the probabilities are multiplied by, (B, N, T, S): 0 or 1 / (1 - rate)."""
    q, k, v = jnp.zeros((B, T, N, 1)), jnp.zeros((B, S, N, 1)), jnp.eye(S)
    v = jnp.broadcast_to(v[None, :, None], (B, S, N, S))
    options |= {"dropout_rate": rate, "dropout_rng": rng}
    out = flash_jax.flash_attention(q, k, v, **options)
    return np.where(np.swapaxes(out, 1, 2) > 0, 1 / (1 - rate), 0)
