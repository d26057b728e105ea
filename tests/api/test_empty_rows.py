"""Rows that may read no key: zero, or the mean of value as in ``jax.nn``, in both passes."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from oracle import kept_pairs, max_error
from sizes import largest_array
from unoptimized import UNOPTIMIZED

import flash_jax
from flash_jax._frameworks.layers import attend

B, T, S, N, K, H, Hv = 2, 7, 11, 6, 3, 5, 5


def qkv(rng, dtype=np.float32, T=T, S=S):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, Hv)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def mask(rng, *shape):
    """Some rows of it are empty."""
    kept = rng.random(shape) < 0.5
    kept[..., 2, :] = False
    return kept


CASES = {
    "mask": lambda rng: {"mask": mask(rng, B, N, T, S)},
    "padding": lambda rng: {"mask": np.zeros((B, 1, 1, S), bool), "is_causal": True},
    "lengths": lambda rng: {
        "query_seq_lengths": np.array([T - 2, 3], np.int32),
        "key_value_seq_lengths": np.array([S - 3, 0], np.int32),
    },
    "window": lambda rng: {"local_window_size": (1, 0), "key_value_seq_lengths": np.array([2, 5])},
    "bias": lambda rng: {"mask": mask(rng, 1, 1, T, S), "bias": rng.random((N, T, S), np.float32)},
}


def with_gradients(attention, options, q, k, v):
    def loss(q, k, v):
        out = attention(q, k, v, **options)
        weights = jnp.cos(jnp.arange(out.size, dtype=np.float32)).reshape(out.shape)
        return jnp.sum(out * weights.astype(out.dtype)), out

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=UNOPTIMIZED)
    (_, out), gradients = both(q, k, v)
    return (out, *gradients)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_mean_is_that_of_jax_nn(options, rng):
    inputs, options = qkv(rng), options(rng)
    theirs = with_gradients(jax.nn.dot_product_attention, options, *inputs)
    rows = kept_pairs((B, N, T, S), **options).any(axis=-1).swapaxes(1, 2)
    assert np.any(~rows[..., None] & (theirs[0] != 0))  # one is empty, and no padding of queries
    options["empty_rows"] = "mean"
    ours = with_gradients(flash_jax.dot_product_attention, options, *inputs)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits(dtype, rng):
    inputs = qkv(rng, dtype)
    out = flash_jax.dot_product_attention(
        *inputs, mask=np.zeros((T, S), bool), empty_rows="mean", return_residual=True
    )[0]
    exact = np.repeat(np.mean(np.asarray(inputs[2], np.float64), 1, keepdims=True), N // K, 2)
    assert out.dtype == dtype
    assert max_error(out, np.broadcast_to(exact, out.shape)) <= float(jnp.finfo(dtype).eps)


def test_without_batch_and_with_more_of_it(rng):
    q, k, v = qkv(rng)
    kept, lengths = mask(rng, N, T, S), np.array([T - 1], np.int32)
    options = {"mask": kept, "empty_rows": "mean"}
    expected = flash_jax.dot_product_attention(q, k, v, **options)
    one = flash_jax.dot_product_attention(q[0], k[0], v[0], query_seq_lengths=lengths, **options)
    np.testing.assert_array_equal(one[:-1], expected[0, :-1])
    np.testing.assert_array_equal(one[-1], 0)
    np.testing.assert_array_equal(attend(q[0], k[0], v[0], **options), expected[0])
    more = attend(q[:, None], k[:, None], v[:, None], **options)
    np.testing.assert_array_equal(more[:, 0], expected)


def test_padding_that_is_nan_stays_out_of_other_rows_and_gradients(rng):
    q, k, v = qkv(rng)
    v = v.at[:, -1].set(jnp.nan)
    kept = np.arange(S) < np.where(np.arange(T) == 2, 0, S - 1)[:, None]
    options = {"mask": kept, "empty_rows": "mean"}
    out, *gradients = with_gradients(flash_jax.dot_product_attention, options, q, k, v)
    np.testing.assert_array_equal(np.isnan(out[0, :, 0, 0]), np.arange(T) == 2)
    # The cotangents of out are numbers, though the loss is not.
    assert all(np.all(np.isfinite(x)) for x in gradients)


def test_no_array_is_larger_than_the_inputs():
    x = jax.ShapeDtypeStruct((1, 2**14, 2, 16), np.float32)
    kept = jax.ShapeDtypeStruct((1, 1, 1, 2**14), bool)

    def loss(x, kept):
        return jnp.sum(flash_jax.dot_product_attention(x, x, x, None, kept, empty_rows="mean"))

    assert largest_array(jax.grad(loss), x, kept) == x.size


def test_another_word_raises(rng):
    for attention in (flash_jax.dot_product_attention, attend):
        with pytest.raises(ValueError, match="empty_rows must be 'zero' or 'mean'; it is 'nan'"):
            attention(*qkv(rng), empty_rows="nan")
