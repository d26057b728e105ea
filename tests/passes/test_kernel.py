"""One kernel per tile: what XLA makes of it, and that the exact loop does what it gets wrong."""

import jax
import numpy as np
import pytest
from derivatives import check, random_call
from integers import grid_inputs, quantized
from jax import numpy as jnp
from options import OPTIONS, S, T, random_inputs
from oracle import assert_within_bound, attention, error_bound, finite_error
from score_mods import CATALOGUE

from flash_jax import (
    flash_attention,
    flash_attention_int8,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
)
from flash_jax._api import options as api_options
from flash_jax._api import plan as api_plan
from flash_jax._machine.processor import machine
from flash_jax._passes import kernel

TILES = (4, 3)  # of this file alone: no other test has compiled these without kernels
DTYPES = (np.float32, jnp.bfloat16)
NAMES = (
    *("none", "mask", "bias of -inf", "causal per element", "window", "lengths", "segments"),
    *("negative scale", "parameters", "lengths and sinks", "everything"),
    *("score mod", "score mod and others"),
)


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
    [
        *({}, {"is_causal": True}, {"logits_soft_cap": 3.0}),
        *({"alibi_slopes": np.ones(4, np.float32)}, {"score_mod": lambda s, b, h, q, k: s + q - k}),
    ],
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
@pytest.mark.parametrize(("name", "dtype"), [(x, DTYPES[i % 2]) for i, x in enumerate(NAMES)])
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
@pytest.mark.parametrize("off", [3, -3, 65, -65, np.nan])
def test_where_the_shift_is_far_off_the_exact_loop_does_the_work(off, rng, monkeypatch):
    shift, inputs, given = kernel._shift, random_inputs(rng), {"is_causal": True, "query_offset": 3}
    monkeypatch.setattr(kernel, "_shift", lambda *x: shift(*x) + off)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_future_and_padding_change_no_bit_and_calls_repeat(dtype, rng):
    T, past, length = 1009, 701, 907
    given = {"is_causal": True, "key_value_seq_lengths": np.int32(length)}
    call = jax.jit(lambda *x: flash_attention_with_lse(*x, **given))
    inputs = random_inputs(rng, B=None, T=T, S=T, H=16, dtype=dtype)
    expected = call(*inputs)
    for x, y in zip(call(*inputs), expected, strict=True):
        np.testing.assert_array_equal(x, y)
    for start, finite in ((past, 7.0), (length, -300.0)):
        changed = [x.copy() for x in inputs]
        for x in changed:
            x[start:] = finite
        out, lse = call(*changed)
        np.testing.assert_array_equal(out[:start], expected[0][:start])
        np.testing.assert_array_equal(lse[:, :start], expected[1][:, :start])


# Derivatives


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "dtype", "tiles"),
    [
        ("none", np.float32, TILES),
        ("none", jnp.bfloat16, TILES),
        ("none", np.float32, (T, S)),  # several instances in a step
        ("none", jnp.bfloat16, (T, S)),
        ("window open right", np.float32, TILES),
        ("lengths and sinks", np.float32, (3, 2)),
        ("everything", np.float32, TILES),
    ],
)
def test_gradients_are_exact(name, dtype, tiles, rng):
    check(rng, random_call(rng, dtype=dtype) | OPTIONS[name](rng) | {"block_sizes": tiles})


@pytest.mark.usefixtures("kernels")
def test_gradients_of_what_instances_share_are_sums(rng):
    q, k, v = random_inputs(rng)
    q = np.stack([q, q[::-1]])
    total = lambda q, k, v: jnp.sum(jnp.sin(flash_attention(q, k, v, block_sizes=(T, S))))  # noqa: E731
    shared = jax.grad(lambda k, v: jnp.sum(jax.vmap(total, (0, None, None))(q, k, v)), (0, 1))
    alone = jax.grad(lambda k, v: sum(total(x, k, v) for x in q), (0, 1))
    for x, y in zip(shared(k, v), alone(k, v), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles", [TILES, (T, S)])
def test_second_derivatives_are_those_of_the_exact_loop(tiles, rng, request):
    x, dx = random_inputs(rng), random_inputs(rng)

    def product():
        gradient = jax.grad(
            lambda *x: jnp.sum(jnp.sin(flash_attention(*x, block_sizes=tiles))), (0, 1, 2)
        )
        return jax.jvp(gradient, x, dx)[1]

    exact = product()
    request.getfixturevalue("kernels")
    for x_, y in zip(product(), exact, strict=True):
        np.testing.assert_allclose(x_, y, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["jagged batch", "relative position bias"])
def test_a_function_of_scores_is_in_the_kernel(name, rng, monkeypatch):
    """Rows that its -inf empties are left to the exact loop; of these there are none."""
    inputs = random_inputs(rng, B=2, T=21, S=27, N=4, K=2)
    call, given = CATALOGUE[name](rng)
    monkeypatch.setattr("flash_jax._passes.forward.forward_tile", _no_exact_loop)
    exact, plain = (attention(*inputs, **given, dtype=x)[0] for x in (None, np.float32))
    out = flash_attention(*inputs, **call, block_sizes=TILES)
    assert finite_error(out, exact) <= error_bound(plain, exact, np.float32)


@pytest.mark.parametrize("bend", [jax.nn.relu, jnp.tanh, lambda s: jnp.minimum(s, 1)])
def test_a_visible_nan_goes_through_a_function_of_scores(bend, rng):
    query, key, value = random_inputs(rng, B=1, T=128, S=256, N=4, K=4, H=16)
    key[0, 5, 2, 0] = np.nan
    mod = lambda score, b, h, q_index, k_index: bend(score)  # noqa: E731
    out = flash_attention(query, key, value, score_mod=mod, block_sizes=(128, 128))
    shown = np.isnan(out).any(axis=(0, 1, 3))
    np.testing.assert_array_equal(shown, np.arange(4) == 2)


# 8 bits


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["none", "causal window", "everything"])
def test_8_bits_agree_with_the_oracle(name, rng):
    (query, key, value), given = grid_inputs(rng), OPTIONS[name](rng)
    exact, plain = (attention(query, key, value, dtype=x, **given) for x in (None, np.float32))
    static = {"probability_dtype": "float32", "block_sizes": TILES}
    results = flash_attention_int8_with_lse(query, *quantized(key, value), **given, **static)
    assert_within_bound(results, exact, plain, np.float32)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("probability_dtype", ["uint8", "bfloat16"])
def test_probabilities_of_8_bits_are_as_fine_as_bfloat16(probability_dtype, rng):
    query, key, value = grid_inputs(rng)
    exact, _ = attention(query, key, value)
    static = {"probability_dtype": probability_dtype, "block_sizes": TILES}
    out = flash_attention_int8(query, *quantized(key, value), **static)
    assert finite_error(out, exact) <= np.max(np.abs(value)) / 256
