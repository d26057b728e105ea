"""What XLA:CPU must be told, to be exact or to be fast: the same numbers, written another way.

Each function says what XLA does without it, and in which versions of jaxlib that was seen.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike, DTypeLike

_PIECES = range(512, 255, -1)  # sizes, the best first
_BYTES_IN_CACHE = 2**19
_FEW_ROWS = 8


def dot(a: Array, b: Array, axis: int = -2, dtype: DTypeLike | None = None) -> Array:
    """a (..., M, K) times b, (..., K, N) or with K as the other ``axis``, summed in dtype: a's.

    ``axis=-1`` multiplies by b transposed, without a copy of it. A transposed a would be copied,
    since XLA's matmul library reads its left operand by rows only (0.10).
    """
    batch = tuple(range(a.ndim - 2))
    dimensions = ((a.ndim - 1,), (b.ndim + axis,)), (batch, batch)
    return lax.dot_general(a, b, dimensions, preferred_element_type=dtype or a.dtype)


def dot_of_batch(a: Array, b: Array, axis: int = -2, dtype: DTypeLike | None = None) -> Array:
    """As ``dot``; where one operand has few rows, XLA sees one batch axis, whatever ``vmap`` adds.

    With several, such products are slower by up to 1.5 times; with more rows they are not (0.12).
    """

    @jax.custom_batching.custom_vmap
    def product(a: Array, b: Array) -> Array:
        lead, b_rows = a.shape[:-2], b.shape[-3 - axis]
        if len(lead) < 2 or min(a.shape[-2], b_rows) > _FEW_ROWS:
            return dot(a, b, axis, dtype)
        a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
        result = dot(a, b, axis, dtype)
        return result.reshape(*lead, *result.shape[1:])

    @product.def_vmap
    def _(_size: int, batched: list[bool], a: Array, b: Array) -> tuple[Array, bool]:
        if all(batched):
            return product(a, b), True
        in_axes = [0 if x else None for x in batched]  # what is shared would be copied
        return jax.vmap(lambda a, b: dot(a, b, axis, dtype), in_axes)(a, b), True

    return product(a, b)


def dot_of_rows(a: Array, b: Array, axis: int, dtype: DTypeLike) -> Array:
    """As ``dot_of_batch``, for few rows: where a has a single one it is multiplied twice.

    Of one row XLA would convert 16-bit b to float32, all of it and first (0.10, 0.12).
    """
    return dot_of_batch(_two_at_least(a), b, axis, dtype)[..., : a.shape[-2], :]


def _two_at_least(a: Array) -> Array:
    return a if a.shape[-2] > 1 else jnp.concatenate([a, a], axis=-2)


def dot_of_many(a: Array, b: Array, dtype: DTypeLike) -> Array:
    """a (..., M, K) times b (..., N, K) transposed, for few rows of a: b is on the left.

    There XLA reads bfloat16 as it lies; what is on the right it brings into another order, which
    pays with more rows. It would turn a product that is transposed at once around (0.12).
    """
    if a.shape[-2] > _FEW_ROWS:
        return dot(a, b, -1, dtype)
    product = apart(dot_of_batch(b, apart(_two_at_least(a)), -1, dtype))
    return apart(jnp.swapaxes(product[..., : a.shape[-2]], -1, -2))


def dot_u8_s8(a: Array, b: Array, axis: int = 1) -> Array:
    """uint8 a (M, K) times int8 b, (N, K) or with K as the other ``axis``, in int32.

    XLA converts both operands to int32 first, and multiplies several times slower, where the
    precision is JAX's default, and where a has a single row (0.10, 0.12).
    """
    product = lax.dot_general(
        _two_at_least(a),
        b,
        (((1,), (axis,)), ((), ())),
        precision=lax.DotAlgorithmPreset.DEFAULT,
        preferred_element_type=np.int32,
    )
    return product[: a.shape[0]]


def in_pieces(product: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """product(a, b) of a (..., M, K) and b (..., K, N), as a sum over pieces of K.

    XLA brings bfloat16 b into another order first, all of a matrix, and then reads it once more for
    the product. A piece of it is still in the cache by then (0.12).
    """
    (*lead, M, K), N = a.shape, b.shape[-1]
    size = next((n for n in _PIECES if K % n == 0), K)
    if size == K or K * N * b.dtype.itemsize < _BYTES_IN_CACHE:
        return product(a, b)
    a = jnp.swapaxes(a.reshape(*lead, M, K // size, size), -3, -2)
    return jnp.sum(product(apart(a), b.reshape(*lead, K // size, size, N)), axis=-3)


def rounded(x: Array) -> Array:
    """A product x, rounded before it meets a sum, and computed once. -inf becomes the lowest float.

    XLA computes a product twice: for its maximum m, and for ``a * b - m``. It may fuse the latter
    into one rounding, and then the difference is not 0 at the maximum, but large where x is large
    (0.10; not seen in 0.12). A select prevents both, and keeps NaN, which XLA's maximum may lose.
    """
    low = jnp.finfo(x.dtype).min
    return jnp.where(x < low, low, x)


@jax.custom_jvp
def apart(x: Array) -> Array:
    """x itself: XLA does not fuse the operations on its two sides, and copies it on all cores.

    Fused, each of these is slower (0.10, 0.12):
        a transposition in a loop and what reads it, by up to two times
        a transposition and a product of bytes, whose operands are then converted to int32, or of
            bfloat16, which are converted to float32
        products and their sum over the first axis, by 4 to 10 times

    A select keeps operations apart. And what does at most one operation per byte gets the square
    root of the cores (0.10, 0.12): this does more of them, which LLVM takes away again.
    """
    size = x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, np.dtype(f"uint{8 * size}"))
    flips = list(range(1, 2 * size + 1))  # an operation per byte that is read or written
    flipped = bits
    for flip in (*flips, functools.reduce(operator.xor, flips)):
        flipped ^= np.array(flip, bits.dtype)
    x = lax.bitcast_convert_type(flipped, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(jnp.isnan(x), jnp.nan, x)
    most = np.array(jnp.iinfo(x.dtype).max, x.dtype)
    return jnp.where(x > most - 1, most, x)


@apart.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return apart(*primals), tangents[0]


def divided(x: ArrayLike, n: ArrayLike) -> tuple[Array, Array]:
    """Quotient and remainder of int32 x >= 0 and n > 0.

    Those of ``jnp`` round down where x is negative, too, for which XLA makes several kernels each.
    """
    return lax.div(x, n), lax.rem(x, n)


def grown_from(x: Array, j: Array) -> Array:
    """x (heads, rows), in a form that XLA grows a kernel from; j >= 0, of the loop around.

    It grows a kernel from a reduction that is used once, over all operations around that its
    library has. Here that is the sum of x and 15 zeros. A select keeps XLA from taking the zeros
    away, and j keeps it from taking the sum out of the loop (0.11, 0.12).
    """
    j = jnp.max(j)  # of key tiles that each head has of its own, -1 among them
    wide = jnp.pad(x[..., None], [(0, 0)] * x.ndim + [(0, 15)])
    return jnp.sum(jnp.where((j < 0) | jnp.isnan(wide), jnp.nan, wide), axis=-1)


def part_of(x: Array, part: slice, dtype: np.dtype) -> Array:
    """x[part] in dtype, which is float32 where x is bfloat16.

    XLA slices bfloat16 in float32, and converts all of x beforehand (0.10; not in 0.12). Sliced as
    integers, only the part is converted.
    """
    if x.dtype != jnp.bfloat16:
        return x[part].astype(dtype)
    bits = lax.bitcast_convert_type(x, np.uint16)[part].astype(np.uint32)
    return lax.bitcast_convert_type(bits << np.uint32(16), np.float32)


@jax.custom_batching.custom_vmap
def in_every_element(condition: Array) -> Array:
    """Whether the condition holds in all elements of a ``vmap``: one bool for a ``cond``.

    With a bool per element ``vmap`` turns the ``cond`` into a select, which runs both branches. A
    collective over a named axis would do, too, but ``shard_map`` takes the name for one of its
    mesh.
    """
    return condition


@in_every_element.def_vmap
def _(_size: int, _batched: list[bool], condition: Array) -> tuple[Array, bool]:
    return jnp.all(condition), False
