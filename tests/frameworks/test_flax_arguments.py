"""What the layers of Flax pass on is honoured, or raises."""

import functools
import inspect

import jax
import numpy as np
import pytest
from flax import linen, nnx
from flax_layers import BOTH, B, D, H, N, S, T, linen_layer, nnx_layer
from jax import numpy as jnp
from layers import random

import flash_jax
from flash_jax import linen_attention_fn, nnx_attention_fn

NO_ARRAY = r"CausalMask must not be used as an array.*decode=True.*leave mask out, or pass a bool"


def test_a_mask_in_decoding_is_refused_by_name(rng):
    """Flax combines the mask of its cache with arrays alone."""
    x, mask = random(rng, B, 1, D), flash_jax.CausalMask()
    layer = nnx_layer(nnx_attention_fn)
    layer.init_cache((B, S, D))
    with pytest.raises(AttributeError, match=NO_ARRAY):
        layer(x, mask=mask, decode=True)

    layer = linen_layer(linen_attention_fn, decode=True)
    variables = layer.init(jax.random.key(0), random(rng, B, S, D))
    with pytest.raises(AttributeError, match=NO_ARRAY):
        layer.apply(variables, x, mask=mask, mutable="cache")


def test_a_mask_has_no_ndim_for_anybody():
    for mask in (flash_jax.CausalMask(), flash_jax.CausalMask() | flash_jax.PrefixMask(1)):
        assert not hasattr(mask, "ndim")
        assert np.ndim(mask) == 0  # an object to NumPy


def test_options_that_flax_does_not_know(rng):
    qkv = [random(rng, B, T, N, H) for _ in range(3)]
    for attention_fn in (nnx_attention_fn, linen_attention_fn):
        out = functools.partial(attention_fn, local_window_size=(None, 0))(*qkv)
        np.testing.assert_array_equal(out, flash_jax.flash_attention(*qkv, is_causal=True))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (nnx_attention_fn, nnx.dot_product_attention),
        (linen_attention_fn, linen.dot_product_attention),
    ],
)
def test_the_arguments_are_those_of_flax(ours, theirs):
    ours, theirs = (list(inspect.signature(f).parameters) for f in (ours, theirs))
    assert ours == [*theirs, "options"]


@BOTH
def test_dtype_is_that_of_the_computation(attention_fn, rng):
    qkv = [random(rng, B, T, N, H) for _ in range(3)]
    expected = attention_fn(*(x.astype(jnp.bfloat16) for x in qkv))
    assert expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(attention_fn(*qkv, dtype=jnp.bfloat16), expected)
    assert attention_fn(qkv[0].astype(jnp.bfloat16), *qkv[1:]).dtype == np.float32


def test_promote_dtype_is_called(rng):
    qkv = [random(rng, B, T, N, H) for _ in range(3)]

    def halved(arrays, dtype):
        return [(x / 2).astype(dtype) for x in arrays]

    out = nnx_attention_fn(*qkv, dtype=jnp.bfloat16, promote_dtype=halved)
    expected = nnx_attention_fn(*(x / 2 for x in qkv), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(out, expected)


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"module": object()}, NotImplementedError, "sow_weights"),
        ({"dropout_rate": 0.1}, ValueError, "dropout_rng must be given"),
        ({"broadcast_dropout": 1}, TypeError, "broadcast_dropout must be a bool"),
        ({"precision": "BF16_BF16_F32_X3"}, NotImplementedError, "precision must be"),
        ({"mask": np.ones((3, B, N, T, T))}, ValueError, r"mask must broadcast to \(\.\.\.,"),
        ({"bias": np.ones((N + 1, 1, 1))}, ValueError, "bias must broadcast"),
        ({"fused": True}, TypeError, "fused"),
    ],
)
def test_what_cannot_be_honoured_raises(attention_fn, options, error, message):
    x = np.ones((B, 3, T, N, H), np.float32)
    with pytest.raises(error, match=message):
        attention_fn(x, x, x, **options)


@pytest.mark.parametrize(
    "name", ["einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"]
)
def test_other_einsums_raise(name):
    x = np.ones((B, T, N, H), np.float32)
    with pytest.raises(NotImplementedError, match=f"{name} must be None"):
        linen_attention_fn(x, x, x, **{name: jnp.einsum})


def test_layers_that_pass_on_an_einsum_raise():
    layer = linen_layer(
        linen_attention_fn,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum"):
        layer.init(jax.random.key(0), jnp.ones((B, T, D)))


def test_layers_that_sow_their_weights_raise():
    x = jnp.ones((B, T, D))
    with pytest.raises(NotImplementedError, match="sow_weights"):
        linen_layer(linen_attention_fn).init(jax.random.key(0), x, sow_weights=True)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        nnx_layer(nnx_attention_fn)(x, sow_weights=True)


def test_batch_axes_that_differ_raise():
    x = np.ones((2, 3, T, N, H), np.float32)
    with pytest.raises(ValueError, match="key must have the batch axes"):
        nnx_attention_fn(x, x.swapaxes(0, 1), x)


def test_precision_is_a_promise_of_cpus_only(monkeypatch):
    x = np.ones((B, T, N, H), np.float32)
    nnx_attention_fn(x, x, x, precision=("high", "default"))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    nnx_attention_fn(x, x, x, precision="default")
    with pytest.raises(NotImplementedError, match="precision must be None except on CPUs"):
        nnx_attention_fn(x, x, x, precision="high")
