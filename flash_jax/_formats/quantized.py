"""Symmetric int8: x is about q * scale, with q = round(x / scale) and scale = max |x| / 127.

A scale serves a block of positions: the whole array, one head, some rows, a channel. Zero stays
zero, -128 is not used, and no value is off by more than half a scale, but for blocks so small that
their scale would be denormal: those become zero.

Jacob et al., Quantization and training of neural networks, 2017, section 2.1 (with zero point 0),
https://arxiv.org/abs/1712.05877
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, export
from jax import numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from .._checks.shapes import accumulator, as_floats, check_shape
from .blocks import as_block_shape, given_scales
from .indexing import taken

LEVELS = 127


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["block_shape"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """An array as int8 values, and scales that blocks of them share.

    It is indexed like an array, with integers, slices and an ellipsis that take whole blocks, or a
    position of one: ``x[:, :64]``. ``x.at[index].set(y)`` is a copy with another part, as JAX's
    arrays have it: y is quantized, and brings its scales, or is a float array, and is rounded at
    the scales that are there.

    Attributes:
        values: int8, in -127..127.
        scales: float32, as many axes: along each, one scale per block, the last of which may be
            shorter. Entry i of an axis belongs to scale ``i // block_shape[axis]``.
        block_shape: positions per scale along each axis.

    Example:
        >>> x = quantize(jnp.ones((6, 4)), (3, None))
        >>> x.shape, x.scales.shape, x.nbytes
        ((6, 4), (2, 1), 32)
        >>> x[3:, 0].shape, x.at[5].set(jnp.zeros(4)).values[4:].tolist()
        ((3,), [[127, 127, 127, 127], [0, 0, 0, 0]])
    """

    values: Array
    scales: Array
    block_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, index: Any) -> QuantizedArray:
        """The part that the index takes."""
        part = taken(index, self.shape, self.blocks)
        return QuantizedArray(self.values[part.values], self.scales[part.scales], part.blocks)

    @property
    def at(self) -> _At:
        """As of JAX's arrays: ``x.at[index].set(y)``."""
        return _At(self)

    @property
    def blocks(self) -> tuple[int, ...]:
        """``block_shape`` of the axes at hand; ``vmap`` takes and adds leading ones."""
        missing = self.ndim - len(self.block_shape)
        return (1,) * missing + self.block_shape[max(0, -missing) :]


class _At:
    def __init__(self, x: QuantizedArray) -> None:
        self._x = x

    def __getitem__(self, index: Any) -> _Part:
        return _Part(self._x, index)


class _Part:
    """A part of an array that may be set."""

    def __init__(self, x: QuantizedArray, index: Any) -> None:
        self._x, self._taken = x, taken(index, x.shape, x.blocks)

    def set(self, y: ArrayLike | QuantizedArray) -> QuantizedArray:
        """The array with y in place of the part; y must broadcast to it."""
        x, part = self._x, self._taken
        if isinstance(y, QuantizedArray):
            old = QuantizedArray(x.values[part.values], x.scales[part.scales], part.blocks)
            fits = y.shape == old.shape and y.scales.shape == old.scales.shape
            if not (part.whole and fits):
                raise ValueError(
                    "y must have the shape and the blocks of the part, and this must be of whole "
                    f"blocks: {old.shape} in {old.blocks}; it is {y.shape} in {y.blocks}"
                )
            scales = x.scales.at[part.scales].set(y.scales)
            return QuantizedArray(x.values.at[part.values].set(y.values), scales, x.block_shape)
        (y,) = as_floats(y=y)
        y = _rounded(y, x[part.values])
        return QuantizedArray(x.values.at[part.values].set(y), x.scales, x.block_shape)


# For exported functions that take one.
export.register_pytree_node_serialization(
    QuantizedArray,
    serialized_name="flash_jax.QuantizedArray",
    serialize_auxdata=lambda block_shape: json.dumps(block_shape).encode(),
    deserialize_auxdata=lambda text: (tuple(json.loads(text)[0]),),
)


def quantize(
    x: ArrayLike,
    block_shape: Sequence[int | None] | None = None,
    scales: ArrayLike | None = None,
) -> QuantizedArray:
    """``x`` as int8 with symmetric scales: given ones, or ``max |x| / 127`` of each block.

    For keys or values (B, S, K, H)::

        None                     one scale for the whole array
        (1, None, 1, None)       one per head
        (1, 64, 1, None)         one per 64 rows of a head
        (1, None, 1, 1)          one per channel

    Args:
        x: float32, bfloat16, float16, or float64 under x64.
        block_shape: positions that share a scale, for every axis of x; None is the whole axis.
            Need not divide the axes.
        scales: float, broadcastable to one per block; >= 0 where they are known. What is beyond 127
            scales is cut to it, so that calls share scales that were found before.

    Returns:
        The values and scales. A block of zeros has scale 0, as has one whose magnitudes are all
        below 127 times the smallest normal float32 (1.5e-36). Where x is traced and a block has a
        NaN or an infinity, its scale is NaN, and it dequantizes to NaN.

    Raises:
        ValueError: block_shape or scales do not fit x, or x is not traced and has a NaN or an
            infinity.
        TypeError: x is no float array, or block_shape holds no integers.

    Example:
        >>> import jax.numpy as jnp
        >>> x = quantize(jnp.array([[1.0, -2.0], [0.5, 0.0]]), (1, None))
        >>> x.values.tolist(), x.scales.shape
        ([[64, -127], [127, 0]], (2, 1))

    References:
        Jacob et al., 2017, section 2.1, https://arxiv.org/abs/1712.05877
    """
    (x,) = as_floats(x=x)
    blocks = as_block_shape(block_shape, x.shape)
    scales = None if scales is None else given_scales(scales, x.shape, blocks)
    quantized, finite = _quantize(x, blocks, scales)
    if not isinstance(finite, Tracer) and not bool(finite):
        raise ValueError("x must be finite; it has a NaN or an infinity")
    return quantized


def dequantize(x: QuantizedArray, dtype: DTypeLike = np.float32) -> Array:
    """``values * scales``, with every scale spread over its block.

    Args:
        x: from ``quantize``, or put together alike.
        dtype: of the result, a float.

    Returns:
        The array of x's shape. After ``quantize`` it is within half a scale of the original.

    Raises:
        ValueError: values, scales and block_shape do not fit each other.
        TypeError: x is no QuantizedArray, its arrays are of other dtypes, or dtype is no float.

    Example:
        >>> import jax.numpy as jnp
        >>> dequantize(quantize(jnp.array([127.0, -3.0]))).tolist()
        [127.0, -3.0]
    """
    x = check_quantized("x", x)
    try:
        found = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"dtype must be a float dtype; it is {dtype!r}")
    return _dequantize(x, np.dtype(found))


def check_quantized(name: str, x: Any) -> QuantizedArray:
    """x as a QuantizedArray whose parts fit each other, or an error that names it."""
    if not isinstance(x, QuantizedArray):
        raise TypeError(f"{name} must be a QuantizedArray; it is {type(x).__name__}")
    for part, dtype in (("values", np.int8), ("scales", np.float32)):
        array = getattr(x, part)
        kind = getattr(array, "dtype", type(array).__name__)
        if kind != dtype:
            raise TypeError(f"{name}.{part} must be {np.dtype(dtype)}; it is {kind}")
    shape = x.block_shape
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{name}.block_shape must be positive integers; it is {shape!r}")
    counts = tuple(-(-size // block) for size, block in zip(x.shape, x.blocks, strict=True))
    check_shape(f"{name}.scales", x.scales, f"one per block {x.blocks} of {x.shape}", counts)
    return x


def spread(scales: Array, shape: Sequence[int], block_shape: Sequence[int]) -> Array:
    """scales with an entry per position, or 1 where all positions of an axis share one."""
    for axis, (size, block) in enumerate(zip(shape, block_shape, strict=True)):
        if scales.shape[axis] != 1 and block != 1:
            scales = jnp.repeat(scales, block, axis, total_repeat_length=scales.shape[axis] * block)
            scales = jax.lax.slice_in_dim(scales, 0, size, axis=axis)
    return scales


def round_to_int8(x: Array, scales: Array) -> Array:
    """x / scales as int8; 0 where the scale is 0 or NaN."""
    inverse = jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)
    # Within +-127 but for a rounding, and clipped for entries that their scale leaves out.
    rounded = jnp.round(jnp.clip(jnp.where(jnp.isfinite(x), x, 0) * inverse, -LEVELS, LEVELS))
    return rounded.astype(np.int8)


def scales_of(amax: Array) -> Array:
    """amax / 127 as float32; 0 where that is below the smallest normal float32."""
    scales = (amax / LEVELS).astype(np.float32)
    return jnp.where(scales < jnp.finfo(np.float32).tiny, 0, scales)


@jax.jit
def _rounded(y: Array, old: QuantizedArray) -> Array:
    """y as the values of a part that has such scales."""
    scales = spread(old.scales, old.shape, old.blocks)
    return round_to_int8(jnp.broadcast_to(y, old.shape).astype(np.float32), scales)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(
    x: Array, block_shape: tuple[int, ...], given: Array | None
) -> tuple[QuantizedArray, Array]:
    """The array, and whether all of x is finite."""
    x = x.astype(accumulator(x.dtype))
    # Apart from the maximum, in which XLA:CPU may lose a NaN.
    finite = jnp.isfinite(x)
    amax, all_finite = jnp.where(finite, jnp.abs(x), 0), finite
    for axis, block in enumerate(block_shape):
        amax = jnp.max(_in_blocks(amax, axis, block, 0), axis=axis + 1)
        all_finite = jnp.all(_in_blocks(all_finite, axis, block, True), axis=axis + 1)
    scales = jnp.where(all_finite, scales_of(amax) if given is None else given, jnp.nan)
    values = round_to_int8(x, spread(scales, x.shape, block_shape).astype(x.dtype))
    return QuantizedArray(values, scales, block_shape), jnp.all(all_finite)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(x: QuantizedArray, dtype: np.dtype) -> Array:
    acc = accumulator(dtype)
    scales = spread(x.scales, x.shape, x.blocks)
    return (x.values.astype(acc) * scales.astype(acc)).astype(dtype)


def _in_blocks(x: Array, axis: int, block: int, fill: float | bool) -> Array:
    """x with ``axis`` as two, blocks and the positions in them, filled up where it is ragged."""
    count = -(-x.shape[axis] // block)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * block - x.shape[axis])
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :])
