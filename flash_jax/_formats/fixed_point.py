"""Fixed point in 32 bits: exact sums of products, a factor, powers of two, and a quotient.

A number is taken apart into bytes, of which the highest is signed. The products of the bytes of two
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
PROBABILITY = 23  # bits of a probability relative to the largest, which is 2^23
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
        # Each product is at most 2^30, and the sum below 2^31.
        return a * c + ((a * d + b * c + ((b * d) >> 15)) >> 15)


class Wide(NamedTuple):
    """Integers 2^24 high + low, with low below 2^24."""

    high: Array
    low: Array

    def plus(self, parts: list[Array]) -> Wide:
        """Plus 2^24 a + 2^16 b + 2^8 c + d, the four as ``products`` gives them."""
        a, b, c, d = parts
        low = self.low + ((b & 0xFF) << 16) + ((c & 0xFFFF) << 8) + d
        return Wide(self.high + a + (b >> 8) + (c >> 16) + (low >> 24), low & 0xFFFFFF)

    def over_last(self) -> Array:
        """All but the last of the last axis divided by the last, which is >= 0, in int32.

        Rounded to nearest, halves away from zero; 0 where the last is 0. The quotient must be at
        most 2^15. First both lose as many bits, at most 8, as leave an uint32 of the last.
        """
        negative = self.high < 0
        low = jnp.where(negative, -self.low & 0xFFFFFF, self.low)
        high = jnp.where(negative, -self.high - (self.low != 0).astype(np.int32), self.high)
        (high, divisor_high), (low, divisor_low) = ((x[..., :-1], x[..., -1:]) for x in (high, low))
        lost = jnp.zeros_like(divisor_high)
        for k in range(7, 15):
            lost += (divisor_high >> k > 0).astype(np.int32)
        rest, low = (high << (8 - lost)) + (low >> (16 + lost)), (low >> lost) & 0xFFFF
        divisor = (divisor_high.astype(np.uint32) << (24 - lost).astype(np.uint32)) + (
            divisor_low >> lost
        ).astype(np.uint32)
        quotient = _divided(rest.astype(np.uint32), low, divisor)
        signed = jnp.where(negative[..., :-1], -quotient, quotient)
        return jnp.where(divisor == 0, 0, signed)


def _divided(rest: Array, low: Array, divisor: Array) -> Array:
    """65536 rest + low over an uint32, rounded, halves up, bit by bit; rest < divisor <= 2^31."""
    quotient = jnp.zeros_like(low)
    for i in range(15, -1, -1):
        rest = rest * 2 + ((low >> i) & 1).astype(np.uint32)
        fits = rest >= divisor
        rest = jnp.where(fits, rest - divisor, rest)
        quotient = quotient * 2 + fits.astype(np.int32)
    return quotient + (rest >= divisor - rest).astype(np.int32)


def in_bytes(x: Array, count: int) -> list[Array]:
    """Integers as so many parts, the highest first and signed, the others in 0..255."""
    return [x >> (8 * (count - 1)), *((x >> (8 * i)) & 0xFF for i in range(count - 2, -1, -1))]


def products(a: list[Array], b: list[Array], axis: int) -> list[Array]:
    """a (..., M, K) times b, as ``dot``, both in bytes: int32 sums, that of the highest first.

    The last is to be multiplied by 1, the one before by 2^8, and so on.
    """
    sums = []
    for power in range(len(a) + len(b) - 1):
        pairs = [(x, b[power - i]) for i, x in enumerate(a) if 0 <= power - i < len(b)]
        left, right = zip(*pairs, strict=True)
        both = jnp.concatenate(left, axis=-1), jnp.concatenate(right, axis=axis)
        sums.append(dot(*both, axis, np.int32))
    return sums


def over_256(parts: list[Array]) -> Array:
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
    above, below = (table.at[x].get(mode="promise_in_bounds") for x in (i, i + 1))
    mantissa = above - (((above - below) * rest) >> _TABLE_BITS)
    bits = _TABLE_ONE - PROBABILITY + jnp.clip(d >> FRACTION, 0, PROBABILITY + 1)
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
