"""A QuantizedArray is indexed and updated like the array that it stands for."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from flash_jax import QuantizedArray, dequantize, quantize

SHAPE = (2, 13, 3, 5)
BLOCKS = (1, 4, 1, None)
INDICES = {
    "an integer": (1,),
    "a negative one": (..., -2, slice(None)),
    "a position of a block": (slice(None), 6),
    "whole blocks": (slice(None), slice(4, 12), slice(1, None)),
    "up to within a block": (0, slice(8, 11), ..., slice(1, 4)),
    "a step": (slice(None, None, -1), ..., slice(None, None, 2)),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_takes_what_it_takes_of_the_floats(index, rng):
    x = quantize(rng.standard_normal(SHAPE).astype(np.float32), BLOCKS)
    part = x[index]
    np.testing.assert_array_equal(dequantize(part), np.asarray(dequantize(x))[index])
    again = x.at[index].set(dequantize(part))
    np.testing.assert_array_equal(again.values, x.values)


def test_an_index_may_be_traced(rng):
    x = quantize(rng.standard_normal(SHAPE).astype(np.float32), BLOCKS)
    mine = jax.jit(lambda x, i: x[1, i])(x, 6)
    np.testing.assert_array_equal(dequantize(mine), dequantize(x)[1, 6])


def test_a_quantized_part_brings_its_scales(rng):
    x, y = (rng.standard_normal((2, *SHAPE[1:])).astype(np.float32) for _ in range(2))
    index = (slice(None), slice(4, 8), 2)
    x, y = quantize(x, BLOCKS), quantize(100 * y, BLOCKS)
    mine = jax.jit(lambda x, y: x.at[index].set(y))(x, y[index])
    expected = np.array(dequantize(x))
    expected[index] = dequantize(y)[index]
    np.testing.assert_array_equal(dequantize(mine), expected)


def test_floats_are_rounded_at_the_scales_that_are_there(rng):
    x = quantize(rng.standard_normal(SHAPE).astype(np.float32), BLOCKS)
    y = 10 * rng.standard_normal((13, 3, 5)).astype(np.float32)
    mine = x.at[0].set(y)
    np.testing.assert_array_equal(mine.scales, x.scales)
    given = quantize(y, BLOCKS[1:], x.scales[0])
    np.testing.assert_array_equal(mine.values[0], given.values)
    largest = 127 * np.repeat(np.asarray(x.scales[0]), 4, axis=0)[:13]
    np.testing.assert_allclose(
        dequantize(given), np.clip(y, -largest, largest), atol=np.max(x.scales) / 2
    )


REFUSED = {
    "index must begin at a block of 4 along axis 1": lambda x: x[:, 2:8],
    "index must have at most 4 axes": lambda x: x[0, 0, 0, 0, 0],
    "index must be in the axis of 13 positions; it is 13": lambda x: x[:, 13],
    "index must hold integers, slices and one ellipsis": lambda x: x[[0, 1]],
    "y must have the shape and the blocks of the part": lambda x: x.at[:, 2].set(x[:, 2]),
    "scales must broadcast to one per block": lambda x: quantize(jnp.ones(3), (1,), [1.0, 2.0]),
    "scales must be >= 0": lambda x: quantize(jnp.ones(3), None, -1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_errors_say_what_an_index_may_be(message):
    x = QuantizedArray(jnp.ones(SHAPE, np.int8), jnp.ones((2, 4, 3, 1)), (1, 4, 1, 5))
    with pytest.raises((IndexError, TypeError, ValueError), match=message):
        REFUSED[message](x)
