"""One kernel per tile: what XLA makes of it, and that the exact loop does what it gets wrong."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from options import OPTIONS, random_inputs
from oracle import assert_within_bound, attention, error_bound, finite_error

from flash_jax import flash_attention, flash_attention_with_lse
from flash_jax._api import options as api_options
from flash_jax._api import plan as api_plan
from flash_jax._machine.processor import machine
from flash_jax._passes import kernel

TILES = (5, 3)
DTYPES = (np.float32, jnp.bfloat16)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels serve tiles of any size, on every processor and with every XLA."""
    here = machine()._replace(one_kernel=True, bfloat16=True)
    monkeypatch.setattr(api_options, "machine", lambda: here)
    monkeypatch.setattr(api_plan, "FEWEST_SCORES", 0)


@pytest.mark.skipif(not machine().one_kernel, reason="this XLA makes no fast kernel of a tile")
@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_whole_rows_is_one_kernel(dtype):
    x = jax.ShapeDtypeStruct((1, 1009, 4, 24), dtype)
    text = jax.jit(flash_attention).lower(x, x, x).compile().as_text()
    assert text.count('kind":"__ynn_fusion') == 1


@pytest.mark.skipif(not machine().one_kernel, reason="this XLA makes no fast kernel of a tile")
@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize(
    "given",
    [{}, {"is_causal": True}, {"logits_soft_cap": 3.0}, {"alibi_slopes": np.ones(4, np.float32)}],
)
def test_a_tile_is_one_kernel(given, monkeypatch):
    """Full tiles and partial ones; two more guess the shift, and look at the sums."""
    monkeypatch.setattr("flash_jax._passes.forward.forward_tile", _no_exact_loop)
    x = jax.ShapeDtypeStruct((1, 1009, 4, 24), np.float32)
    f = lambda *x: flash_attention_with_lse(*x, **given, block_sizes=(503, 251))  # noqa: E731
    text = jax.jit(f).lower(x, x, x).compile().as_text()
    assert text.count('kind":"__ynn_fusion') == 4
    outside = text[: text.index("ENTRY")].split("\n\n")
    assert not [x for x in outside if "fused_computation" not in x and "f32[4,503,251]" in x]


def _no_exact_loop(operands, plan, tile):
    rows = jnp.zeros((tile.heads, tile.rows))
    return kernel.online.State(rows, rows, jnp.zeros((*rows.shape, operands.v.shape[-1])))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("name", "dtype"), [(x, DTYPES[i % 2]) for i, x in enumerate(OPTIONS)])
def test_every_option_agrees_with_the_oracle(name, dtype, rng):
    inputs, given = random_inputs(rng, dtype=dtype), OPTIONS[name](rng)
    exact = attention(*inputs, **given)
    plain = attention(*inputs, dtype=dtype, **given)
    results = flash_attention_with_lse(*inputs, **given, block_sizes=TILES)
    assert_within_bound(results, exact, plain, dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_rows_agree_with_the_oracle(dtype, rng):
    inputs = random_inputs(rng, dtype=dtype)
    exact, plain = (attention(*inputs, dtype=x)[0] for x in (None, dtype))
    error = finite_error(flash_attention(*inputs), exact)
    assert error <= error_bound(plain, exact, dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("off", [3, -25, 120, np.nan])
def test_where_the_shift_is_far_off_the_exact_loop_does_the_work(off, rng, monkeypatch):
    guess, inputs, given = kernel._guess, random_inputs(rng), {"is_causal": True, "query_offset": 3}
    monkeypatch.setattr(kernel, "_guess", lambda *x: guess(*x) + off)
    exact, plain = (attention(*inputs, dtype=x, **given) for x in (None, np.float32))
    call = jax.jit(lambda *x: flash_attention_with_lse(*x, **given, block_sizes=TILES))
    jax.clear_caches()
    assert_within_bound(call(*inputs), exact, plain, np.float32)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [3.0, 1e9, 1e18])
def test_logits_of_any_size_agree_with_the_oracle(size, rng):
    q, k, v = random_inputs(rng)
    inputs = (q * np.float32(size), k * np.float32(size), v)
    exact, plain = (attention(*inputs, dtype=x) for x in (None, np.float32))
    results = flash_attention_with_lse(*inputs, block_sizes=TILES)
    assert_within_bound(results, exact, plain, np.float32)


@pytest.mark.usefixtures("kernels")
def test_what_is_masked_changes_no_bit(rng):
    q, k, v = random_inputs(rng, B=None)
    lengths = {"key_value_seq_lengths": np.int32(13)}
    call = jax.jit(lambda k, v: flash_attention_with_lse(q, k, v, **lengths, block_sizes=TILES))
    expected = call(k, v)
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        hidden_k, hidden_v = k.copy(), v.copy()
        hidden_k[13:], hidden_v[14:] = bad, bad
        for x, y in zip(call(hidden_k, hidden_v), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)
