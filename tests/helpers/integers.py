"""Inputs of attention in 8 bits, on a grid where quantization changes nothing; errors of it."""

import numpy as np
import pytest
from jax import numpy as jnp
from options import TILES, B, H, Hv, K, N, S, T
from oracle import numpy_attention

from flash_jax import quantize

IN_FLOAT32 = {"probability_dtype": "float32", "block_sizes": TILES}


PROBABILITIES = pytest.mark.parametrize("probability_dtype", ["uint8", "bfloat16", "float32"])


def on_grid(rng, *shape, axis):
    """Multiples of 1/64, the largest along the axis being 127/64: its scale is exactly 1/64."""
    integers = rng.integers(-126, 127, shape)
    np.put_along_axis(integers, np.argmax(np.abs(integers), axis, keepdims=True), 127, axis)
    return (integers / 64).astype(np.float32)


def grid_inputs(rng, B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv):
    """Queries and keys on the grid per row, values per channel; the mean of the keys is 0."""
    query = on_grid(rng, B, T, N, H, axis=-1)
    half = on_grid(rng, B, S // 2, K, H, axis=-1)
    key = np.concatenate([half, np.zeros((B, S % 2, K, H), np.float32), -half], axis=1)
    return query, key, on_grid(rng, B, S, K, Hv, axis=1)


def quantized(key, value, rows=1):
    """Keys with a scale per row or so, values with one per channel."""
    return quantize(key, (1, rows, 1, None)), quantize(value, (1, None, 1, 1))


def exact_attention(query, key, value):
    """The oracle's output and lse of long sequences: from matrix products, without options."""
    out, lse = numpy_attention(*(np.swapaxes(x, 1, 2) for x in (query, key, value)))
    return np.swapaxes(out, 1, 2), lse


def relative_error(x, exact):
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


def cosine(x, exact):
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return np.sum(x * exact) / np.linalg.norm(x) / np.linalg.norm(exact)


def random_integers(rng, *shape):
    return rng.integers(-127, 128, shape).astype(np.int8)


def integer_qkv(rng, *, N=6, K=3, T=37, S=61, H=5, Hv=3):
    return [random_integers(rng, *shape) for shape in ((N, T, H), (K, S, H), (K, S, Hv))]


SCALES = 0.011, 0.017, 0.023


def normal(rng, S, H, T=None):
    shapes = (1, T or S, 2, H), (1, S, 2, H), (1, S, 2, H)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def weighted(call, weights):
    """A number whose gradient reaches every output."""

    def total(*inputs):
        out, lse = call(*inputs)
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(lse))

    return total
