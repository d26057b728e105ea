"""Symbolic batch sizes and lengths under ``jax.export``: exported once, run at any size."""

import functools

import jax
import numpy as np
import pytest
from jax import export
from jax import numpy as jnp
from oracle import max_error
from paths import PATHS, derivatives
from unoptimized import run

from flash_jax import FlashAttentionConfig, dot_product_attention, flash_attention, flash_mha

HEADS = {"N": 4, "K": 2, "H": 3}
OUT = "BTNH", "BNT"  # the axes of output and lse


def exported(path, sizes, rng):
    """The path with its derivatives, exported for these symbolic sizes."""
    dtypes = {name: x.dtype for name, x in path.arrays(rng, B=1, T=1, S=1, **HEADS).items()}
    sizes = dict(zip("BTS", export.symbolic_shape(sizes), strict=True)) | HEADS
    sizes |= {"1": 1} | ({"T": 1} if path.one_query else {})

    def spec(axes, dtype=np.float32):
        return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes), dtype)

    x = {name: spec(axes, dtypes[name]) for name, axes in path.all_axes.items()}
    function = functools.partial(derivatives, path)
    return export.export(jax.jit(function))(x, tuple(map(spec, OUT)))


SYMBOLIC = PATHS | {
    "segments and bias": PATHS["bias"]._replace(
        axes=PATHS["segments"].axes | PATHS["bias"].axes,
    )
}


# Of lengths that tiles are longer than, and shorter.
@pytest.mark.parametrize(
    ("name", "symbols", "sizes"),
    [
        ("Mask", "b, t, s", (3, 11, 263)),
        ("parameters", "b, 11, 13", (3, 11, 13)),
        ("segments and bias", "b, t, s", (1, 263, 7)),
        ("dropout", "2, t, t", (2, 13, 13)),
        ("decode", "b, 1, s", (3, 1, 13)),
        ("INT8", "b, t, s", (3, 11, 263)),
        ("kernels", "b, t, t", (2, 7, 7)),
    ],
)
def test_an_exported_call_takes_every_size(name, symbols, sizes, rng):
    path, sizes = SYMBOLIC[name], dict(zip("BTS", sizes, strict=True)) | HEADS
    x = path.arrays(rng, **sizes)
    weights = tuple(
        rng.standard_normal(tuple(sizes[axis] for axis in axes)).astype(np.float32) for axes in OUT
    )
    call = export.deserialize(exported(path, symbols, rng).serialize()).call
    expected = run(functools.partial(derivatives, path), x, weights)
    for y, right in zip(*map(jax.tree.leaves, (run(call, x, weights), expected)), strict=True):
        # Probabilities in 8 bits are relative to the largest of a tile.
        bound = (2 / 255 if name == "INT8" else 1e-5) * max(1, np.max(np.abs(right)))
        assert max_error(y, np.asarray(right, np.float64)) <= bound


def test_an_exported_call_is_differentiated_after_export(rng):
    x = jax.ShapeDtypeStruct((*export.symbolic_shape("b, t"), 4, 3), np.float32)
    call = export.export(jax.jit(lambda q, k: dot_product_attention(q, k, k, is_causal=True)))(x, x)
    call = export.deserialize(call.serialize(vjp_order=1)).call
    q, k = rng.standard_normal((2, 3, 11, 4, 3)).astype(np.float32)

    def gradients(attend):
        return jax.grad(lambda q, k: jnp.sum(attend(q, k) ** 2), (0, 1))

    plain = gradients(lambda q, k: jax.nn.dot_product_attention(q, k, k, is_causal=True))
    for y, right in zip(run(gradients(call), q, k), run(plain, q, k), strict=True):
        np.testing.assert_allclose(y, right, rtol=0, atol=1e-5)


def test_a_second_derivative_of_an_export_is_refused_by_name():
    x = jax.ShapeDtypeStruct((2, 5, 4, 3), np.float32)
    call = export.export(jax.jit(lambda q: flash_attention(q, q, q)))(x)
    with pytest.raises(
        NotImplementedError, match=r"no second reverse pass.*jax\.jvp.* of jax\.grad"
    ):
        call.serialize(vjp_order=2)


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (["2, 5, n, 3", "2, 7, n, 3", "2, 7, n, 3"], "query"),
        (["2, 5, 4, n", "2, 7, 4, n", "2, 7, 4, 3"], "query"),
        (["2, 5, 4, 3", "2, 7, n, 3", "2, 7, n, 3"], "key"),
        (["2, 5, 4, 3", "2, 7, 4, 3", "2, 7, 4, n"], "value"),
    ],
)
def test_symbolic_heads_are_refused_by_name(shapes, name):
    scope = export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), np.float32)
        for shape in shapes
    ]
    with pytest.raises(NotImplementedError, match=f"{name} may be symbolic in the axes B, T and S"):
        export.export(jax.jit(flash_attention))(*specs)


def test_a_kernel_of_symbolic_heads_is_refused_by_name():
    shape = (export.symbolic_shape("n")[0], 5, 4)
    spec = jax.ShapeDtypeStruct(shape, np.float32)
    call = jax.jit(functools.partial(flash_mha, FlashAttentionConfig(16, 16, 4)))
    with pytest.raises(NotImplementedError, match="q may be symbolic in the axes B, T and S only"):
        export.export(call)(spec, spec, spec)
