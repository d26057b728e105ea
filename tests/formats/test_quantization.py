"""quantize, dequantize and QuantizedArray."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

from flash_jax import QuantizedArray, dequantize, quantize

SHAPE = (2, 13, 3, 5)
BLOCKS = {
    "tensor": None,
    "head": (1, None, 1, None),
    "head of all batch elements": (None, None, 1, None),
    "rows": (1, 4, 1, None),
    "row": (1, 1, 1, None),
    "channel": (1, None, 1, 1),
    "channel of rows": (1, 4, 1, 1),
    "entry": (1, 1, 1, 1),
    "bricks": (2, 5, 2, 3),
    "longer than the axes": (100, 100, 100, 100),
}


def by_blocks():
    return pytest.mark.parametrize("block_shape", BLOCKS.values(), ids=BLOCKS)


def numpy_scales(x, block_shape):
    """Scales of every block, and for every entry the scale of its block."""
    block_shape = block_shape or (None,) * x.ndim
    blocks = [n if b is None else b for n, b in zip(x.shape, block_shape, strict=True)]
    counts = [-(-n // b) for n, b in zip(x.shape, blocks, strict=True)]
    scales, spread = np.zeros(counts, np.float32), np.zeros(x.shape, np.float32)
    for index in np.ndindex(*counts):
        part = tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, blocks, strict=True))
        scales[index] = spread[part] = np.max(np.abs(x[part]), initial=0) / np.float32(127)
    return scales, spread


@by_blocks()
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_values_are_within_half_a_scale(block_shape, dtype, rng):
    x = rng.standard_normal(SHAPE).astype(dtype)
    scales, spread = numpy_scales(x.astype(np.float32), block_shape)
    quantized = quantize(x, block_shape)
    assert quantized.values.dtype == np.int8
    assert quantized.shape == SHAPE
    np.testing.assert_allclose(quantized.scales, scales, rtol=1e-6)
    assert np.max(np.abs(np.asarray(quantized.values, np.int32))) == 127
    error = np.abs(np.asarray(dequantize(quantized)) - x.astype(np.float32))
    assert (error <= spread / 2 * (1 + 1e-5)).all()
    if block_shape == (1, 1, 1, 1):  # nothing but the largest
        assert (error <= 1e-6 * spread * 127).all()


NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@hypothesis.given(
    x=st.sampled_from([1, 7, 9]).flatmap(lambda n: st.lists(NUMBERS, min_size=n, max_size=n)),
    block=st.sampled_from([1, 3, 10]),  # few sizes: each is a program
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_properties_of_any_numbers(x, block):
    x = np.array(x, np.float32)
    quantized = quantize(x, (block,))
    spread = np.repeat(np.asarray(quantized.scales), block)[: len(x)]
    back = np.asarray(dequantize(quantized))
    small = np.float32(127 * np.finfo(np.float32).tiny)  # where scales would be denormal
    assert (np.abs(back - x) <= np.maximum(spread / 2 * (1 + 1e-5), small)).all()
    np.testing.assert_array_equal(quantize(-x, (block,)).values, -quantized.values)
    again = quantize(back, (block,))
    np.testing.assert_array_equal(again.values, quantized.values)


def test_a_constant_inside_a_jit_is_accepted():
    x = jnp.ones((2, 4))
    np.testing.assert_allclose(jax.jit(lambda y: dequantize(quantize(x)) + y)(0.0), x, rtol=1e-6)


def test_zeros_have_scale_zero():
    x = quantize(np.zeros((3, 4), np.float32), (1, None))
    np.testing.assert_array_equal(x.scales, np.zeros((3, 1)))
    np.testing.assert_array_equal(dequantize(x), np.zeros((3, 4)))


@pytest.mark.parametrize("c", [1.0, -0.3, 1e-30, 3e38])
def test_constants_come_back(c):
    x = quantize(np.full((3, 4), c, np.float32))
    assert (np.abs(x.values) == 127).all()
    np.testing.assert_allclose(dequantize(x), np.full((3, 4), c), rtol=1e-6)


@pytest.mark.parametrize("c", [1e-45, 1e-40, 1e-37])
def test_what_would_have_a_denormal_scale_becomes_zero(c):
    x = quantize(np.full(3, c, np.float32))
    np.testing.assert_array_equal(x.scales, [0])
    np.testing.assert_array_equal(x.values, [0, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_raises_or_makes_its_block_nan(bad):
    x = np.array([[1, 2], [3, bad]], np.float32)
    with pytest.raises(ValueError, match="x must be finite"):
        quantize(x)
    traced = jax.jit(lambda x: dequantize(quantize(x, (1, None))))(x)
    np.testing.assert_allclose(traced[0], [1, 2], atol=1 / 127)
    assert np.isnan(traced[1]).all()


@pytest.mark.usefixtures("x64")
def test_float64_is_accepted(rng):
    x = rng.standard_normal((4, 5))
    quantized = quantize(x)
    assert quantized.scales.dtype == np.float32
    assert dequantize(quantized, np.float64).dtype == np.float64
    np.testing.assert_allclose(dequantize(quantized), x, atol=np.abs(x).max() / 250)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@pytest.mark.parametrize("whole", [True, False])
def test_an_empty_array_stays_empty(shape, whole):
    x = quantize(np.zeros(shape, np.float32), None if whole else (2,) * len(shape))
    assert dequantize(x).shape == shape


def test_a_number_is_an_array_of_one():
    np.testing.assert_allclose(dequantize(quantize(jnp.float32(-3))), -3, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_dequantize_gives_the_dtype_asked_for(dtype, rng):
    assert dequantize(quantize(rng.standard_normal(5).astype(np.float32)), dtype).dtype == dtype


@pytest.mark.parametrize(
    ("H", "block_shape"),
    [(64, (1, 64, 1, None)), (64, (1, None, 1, 1)), (128, (1, 1, 1, None))],
    ids=["rows", "channel", "row"],
)
def test_a_quantized_cache_takes_a_quarter_of_the_memory(H, block_shape):
    x = jnp.ones((2, 1024, 4, H))
    assert quantize(x, block_shape).nbytes <= x.nbytes / 4 * 1.04


def test_it_is_a_pytree(rng):
    x = rng.standard_normal((3, 7, 5)).astype(np.float32)
    quantized = quantize(x, (1, 3, None))
    copy = jax.tree.map(lambda x: x, quantized)
    assert isinstance(copy, QuantizedArray)
    assert copy.block_shape == (1, 3, 5)
    expected = dequantize(quantized)
    np.testing.assert_array_equal(jax.jit(dequantize)(quantized), expected)
    np.testing.assert_array_equal(jax.vmap(dequantize)(quantized), expected)
    _, scanned = lax.scan(lambda c, x: (c, dequantize(x)), 0, quantized)
    np.testing.assert_array_equal(scanned, expected)
    mapped = jax.vmap(lambda x: quantize(x, (3, None)))(x)
    np.testing.assert_array_equal(dequantize(mapped), expected)


def test_strict_modes_of_jax(rng):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    expected = dequantize(quantize(x, (1, 4, 1, None)))
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    ):
        np.testing.assert_array_equal(dequantize(quantize(x, (1, 4, 1, None))), expected)


@pytest.mark.parametrize(
    ("block_shape", "error", "message"),
    [
        ((1, None), ValueError, r"block_shape must have an entry per axis of x, 3"),
        ((1, 0, 1), ValueError, r"block_shape must be > 0; it is 0"),
        ((1, 2.0, 1), TypeError, r"block_shape must be an integer; it is 2.0"),
        (3, TypeError, r"block_shape must be a tuple or None; it is 3"),
    ],
)
def test_a_wrong_block_shape_is_named(block_shape, error, message):
    with pytest.raises(error, match=message):
        quantize(np.ones((2, 3, 4), np.float32), block_shape)


@pytest.mark.parametrize("x", [[1.0], np.ones(3, np.int32), None])
def test_what_is_no_float_array_is_named(x):
    with pytest.raises(TypeError, match=r"^x must be"):
        quantize(x)


VALUES, SCALES = np.zeros((4, 6), np.int8), np.ones((2, 1), np.float32)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones(3), TypeError, "x must be a QuantizedArray; it is ndarray"),
        (QuantizedArray(VALUES.astype(np.int32), SCALES, (2, 6)), TypeError, r"x\.values must be"),
        (QuantizedArray(VALUES, SCALES.astype(np.float64), (2, 6)), TypeError, r"x\.scales must"),
        (QuantizedArray(VALUES, SCALES, (0, 6)), ValueError, r"x\.block_shape must be positive"),
        (QuantizedArray(VALUES, SCALES, [2, 6]), ValueError, r"x\.block_shape must be positive"),
        (QuantizedArray(VALUES, SCALES, (1, 6)), ValueError, r"x\.scales must be one per block"),
    ],
)
def test_parts_that_do_not_fit_are_named(x, error, message):
    with pytest.raises(error, match=message):
        dequantize(x)


@pytest.mark.parametrize("dtype", [np.int32, None, "no dtype"])
def test_dequantize_to_no_float_is_refused(dtype):
    with pytest.raises(TypeError, match="dtype must be a float dtype"):
        dequantize(QuantizedArray(VALUES, SCALES, (2, 6)), dtype)
