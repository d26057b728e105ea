"""exp of numbers that are not large, as the softmax needs it.

XLA:CPU's own exp handles every float; a softmax only asks for exp(s - m) with m at or near the
maximum. Dropping the rest (overflow) shortens the vector code of the innermost elementwise pass.

    exp(x) = 2^n 2^f,   n = round(x log2 e),   f = x log2 e - n in [-1/2, 1/2]

2^f is the polynomial with constant term 1 and least maximal relative error there (before rounding
2e-9 at degree 6 and 3e-6 at degree 4), and 2^n is assembled from its bits: adding 1.5 * 2^23 + 127
to n leaves n + 127, the biased exponent, in the low bits of the mantissa.
"""

import functools

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

_LOG2_E = np.float32(1.4426950408889634)
_TWO_TO_F = {
    4: (1.0, 0.6931241933678396, 0.24024098611259576, 0.055906425036455945, 0.009582853168904525),
    6: (
        1.0,
        0.6931472028550455,
        0.24022647913631845,
        0.05550332471157595,
        0.0096184373574579,
        0.0013398874404083726,
        0.00015353361942539975,
    ),
}
_EXPONENT_TO_MANTISSA = np.float32(1.5 * 2**23 + 127)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def exp(x: Array, degree: int = 6) -> Array:
    """exp(x) for x < 88, -inf or NaN; in float32 below exp(-88) the result is 0."""
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    y = x * _LOG2_E
    y = jnp.where(y < -127, np.float32(-127), y)  # a select, since XLA's maximum may drop NaN
    n = lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN)
    f = y - n
    *lower, last = (np.float32(c) for c in _TWO_TO_F[degree])
    p = jnp.full_like(f, last)
    for c in reversed(lower):
        p = p * f + c
    biased = lax.bitcast_convert_type(n + _EXPONENT_TO_MANTISSA, jnp.int32)
    return p * lax.bitcast_convert_type(lax.shift_left(biased, np.int32(23)), jnp.float32)


@exp.defjvp
def _(degree: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = exp(*primals, degree)
    return y, y * tangents[0]
