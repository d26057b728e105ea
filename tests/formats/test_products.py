"""Products of bfloat16 inputs, with and without instructions for them."""

import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from options import OPTIONS, random_inputs
from oracle import assert_within_bound, attention

from flash_jax import flash_attention_with_lse
from flash_jax._api import options
from flash_jax._machine import processor as _machine


@pytest.fixture(params=[True, False], ids=["multiplies bfloat16", "does not"])
def multiplies_bfloat16(request, monkeypatch):
    here = _machine.machine()._replace(bfloat16=request.param)
    monkeypatch.setattr(options, "machine", lambda: here)
    return request.param


@pytest.mark.parametrize("name", ["none", "everything"])
def test_every_machine_keeps_the_bound_of_bfloat16(name, multiplies_bfloat16, rng):
    inputs, options = random_inputs(rng, dtype=jnp.bfloat16), OPTIONS[name](rng)
    exact = attention(*inputs, **options)
    plain = attention(*inputs, dtype=jnp.bfloat16, **options)
    results = flash_attention_with_lse(*inputs, **options, block_sizes=(5, 3))
    assert_within_bound(results, exact, plain, jnp.bfloat16)


def test_products_are_of_what_the_machine_multiplies(multiplies_bfloat16):
    """XLA converts for a machine without, so the program as it is given to XLA tells."""
    x = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.bfloat16)
    text = jax.jit(flash_attention_with_lse).lower(x, x, x).as_text()
    kinds = set(re.findall(r"dot_general .*: \(tensor<[\dx]*x(\w+)>", text))
    assert kinds == {"bf16" if multiplies_bfloat16 else "f32"}


def test_gradients_of_bfloat16_inputs_agree(multiplies_bfloat16, rng):
    inputs = random_inputs(rng, dtype=jnp.bfloat16)
    total = lambda *x: jnp.sum(flash_attention_with_lse(*x)[0].astype(np.float32) ** 2)  # noqa: E731
    gradients = jax.grad(total, (0, 1, 2))(*inputs)
    expected = jax.grad(total, (0, 1, 2))(*(x.astype(np.float32) for x in inputs))
    for x, y in zip(gradients, expected, strict=True):
        assert x.dtype == jnp.bfloat16
        y = np.asarray(y, np.float32)
        np.testing.assert_allclose(np.asarray(x, np.float32), y, atol=0.03 * np.max(np.abs(y)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name : x\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags : amx_bf16\n", True),
        ("flags : fpu avx2 avx512_bf16x\n", False),
        ("no flags\n", False),
        (None, False),
    ],
)
def test_bfloat16_instructions_are_found_in_the_flags(text, expected, tmp_path):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert _machine._multiplies_bfloat16(path) is expected
