"""Fixed point in 32 bits: exact sums of products, a factor, powers of two, and a quotient.

A number of 16 bits is x = 256 high + low, with low in 0..255. The products of the parts of two
numbers are summed apart, so that no sum leaves 32 bits, and sums of integers are the same in every
order. ``attention_q15`` has the specification, and tells the ranges.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from jax import Array
from jax import numpy as jnp

from .._tiles.xla import dot

FRACTION = 16  # bits of a logit behind the point
PROBABILITY = 15  # bits of a probability relative to the largest, which is 2^15
_TABLE_BITS = 8
_TABLE_ONE = 30


class Multiplier(NamedTuple):
    """A positive factor, mantissa * 2^(exponent - 30), with a mantissa of 30 bits.

    Example:
        >>> Multiplier.of(0.75)
        Multiplier(mantissa=805306368, exponent=0)
    """

    mantissa: int
    exponent: int

    @classmethod
    def of(cls, factor: float) -> Multiplier:
        fraction, exponent = math.frexp(factor)
        mantissa = round(fraction * 2**30)
        return cls(2**29, exponent + 1) if mantissa == 2**30 else cls(mantissa, exponent)

    def times(self, x: Array) -> Array:
        """floor(x * mantissa / 2^30), for int32 x of at most 2^30."""
        a, b = x >> 15, x & 0x7FFF
        c, d = self.mantissa >> 15, self.mantissa & 0x7FFF
        # Each product is below 2^30, and the sum below 2^31.
        return a * c + ((a * d + b * c + ((b * d) >> 15)) >> 15)


class Wide(NamedTuple):
    """Integers 65536 high + low, with low in 0..65535."""

    high: Array
    low: Array

    def plus(self, parts: tuple[Array, Array, Array]) -> Wide:
        """Plus 2^16 a + 2^8 b + c, the three as ``products`` gives them."""
        a, b, c = parts
        low = self.low + ((b & 0xFF) << 8) + c
        return Wide(self.high + a + (b >> 8) + (low >> 16), low & 0xFFFF)

    def over(self, x: Array) -> Array:
        """Divided by uint32 x, in int32, with halves away from zero; 0 where x is 0.

        The quotient must be at most 2^15. Bit by bit, in uint32: what remains is below x <= 2^31.
        """
        negative = self.high < 0
        low = jnp.where(negative, -self.low & 0xFFFF, self.low)
        high = jnp.where(negative, -self.high - (self.low != 0).astype(np.int32), self.high)
        rest, quotient = high.astype(np.uint32), jnp.zeros_like(high)
        for i in range(15, -1, -1):
            rest = rest * 2 + ((low >> i) & 1).astype(np.uint32)
            fits = rest >= x
            rest = jnp.where(fits, rest - x, rest)
            quotient = quotient * 2 + fits.astype(np.int32)
        quotient = quotient + (rest >= x - rest).astype(np.int32)
        return jnp.where(x == 0, 0, jnp.where(negative, -quotient, quotient))


def products(a: Array, b: Array, axis: int) -> tuple[Array, Array, Array]:
    """a (..., M, K) times b, as ``dot``: the int32 parts of sums 2^16 . + 2^8 . + . of products."""
    (a_high, a_low), (b_high, b_low) = ((x >> 8, x & 0xFF) for x in (a, b))
    a_both = jnp.concatenate([a_high, a_low], axis=-1)
    b_both = jnp.concatenate([b_low, b_high], axis=axis)
    pairs = (a_high, b_high), (a_both, b_both), (a_low, b_low)
    x, y, z = (dot(left, right, axis, np.int32) for left, right in pairs)
    return x, y, z


def over_256(parts: tuple[Array, Array, Array]) -> Array:
    """2^16 a + 2^8 b + c over 256, rounded, halves up."""
    a, b, c = parts
    return (a << 8) + b + ((c + 128) >> 8)


def shifted(x: Array, bits: int) -> Array:
    """x / 2^bits, rounded, halves up; times a power of two where ``bits`` is negative."""
    if bits <= 0:
        return x << -bits
    return jnp.zeros_like(x) if bits > 30 else (x + (1 << (bits - 1))) >> bits


def power_of_two(d: Array) -> Array:
    """2^(PROBABILITY - d), rounded, halves up: int32, of d >= 0 with FRACTION bits.

    Between the entries of a table it is linear, rounded up to the next 2^-30.
    """
    fraction = d & 0xFFFF
    i, rest = fraction >> _TABLE_BITS, fraction & 0xFF
    table = jnp.asarray(_table())
    above, below = table[i], table[i + 1]
    mantissa = above - (((above - below) * rest) >> _TABLE_BITS)
    bits = _TABLE_ONE - PROBABILITY + jnp.clip(d >> FRACTION, 0, 16)
    return jnp.where(bits > 30, 0, (mantissa + (1 << (bits - 1))) >> bits)


@functools.cache
def _table() -> np.ndarray:
    """round(2^30 2^(-i / 256)) of i = 0..256, by integers: the root of order 256 is eight roots."""

    def root(x: int) -> int:
        for _ in range(8):
            x = math.isqrt(x)
        return x

    doubled = (root(2 ** (256 * (_TABLE_ONE + 1) - i)) for i in range(257))
    return np.array([(x + 1) >> 1 for x in doubled], np.int32)
