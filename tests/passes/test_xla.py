"""What is written another way for XLA is the same number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_jax._tiles.xla import apart, divided, dot, dot_of_many, in_pieces

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8"])
def test_apart_is_the_identity(dtype):
    values = np.arange(-128, 128) if dtype != "uint8" else np.arange(256)
    x = jnp.asarray(values).astype(dtype)
    if dtype not in ("int8", "uint8"):
        x = jnp.concatenate([x / 7, jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0], dtype)])
    np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (jax.jit(apart)(x), x)))


def test_apart_is_linear_in_both_modes():
    x = jnp.array([0.5, -3.0, jnp.inf])
    _, moved = jax.jvp(apart, (x,), (2 * jnp.ones(3),))
    assert moved.tolist() == [2.0] * 3
    assert jax.grad(lambda x: jnp.sum(apart(x)))(x).tolist() == [1.0] * 3


def test_divided_is_quotient_and_remainder():
    x, n = np.arange(29, dtype=np.int32), np.int32(7)
    for y, right in zip(divided(x, n), np.divmod(x, n), strict=True):
        np.testing.assert_array_equal(y, right)


@pytest.mark.parametrize("K", [1024, 1020, 1021, 130])  # of 512, of 510, a prime, and few
def test_a_product_in_pieces_is_the_product(K, rng):
    a, b = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((2, 3, K), (2, K, 257)))
    shapes = []

    def product(a, b):
        shapes.append(b.shape)
        return dot(a, b)

    np.testing.assert_array_equal(in_pieces(product, a, b), a @ b)
    pieces = {1024: (2, 2, 512, 257), 1020: (2, 2, 510, 257)}
    assert shapes == [pieces.get(K, b.shape)]


@pytest.mark.parametrize("rows", [1, 4, 7, 13])
def test_few_rows_stand_on_the_right_of_their_product(rows, rng):
    """Where XLA may not turn the product around; with more rows they are on the left."""
    a, b = (
        rng.integers(-3, 4, shape).astype(np.float32) for shape in ((3, rows, 64), (3, 257, 64))
    )
    program = jax.jit(lambda a, b: dot_of_many(a, b, np.float32)).lower(a, b).compile()
    np.testing.assert_array_equal(program(a, b), a @ np.swapaxes(b, 1, 2))
    columns = {13: 257, 1: 2}.get(rows, rows)
    (found,) = re.findall(r"f32\[3,\d+,(\d+)\]\S* dot\(", program.as_text())
    assert int(found) == columns
