"""A vmap is a loop, over every array and any nesting."""

import functools

import jax
import numpy as np
import oracle
import pytest
from batched import BATCHED, RNG, B, N, S, T, attention, element, mapped, parity
from oracle import error_bound, max_error

from flash_jax import Mask, PredicateMask, WindowMask, flash_attention_with_lse, merge_attention


@pytest.mark.parametrize("options", BATCHED.values(), ids=BATCHED)
def test_vmap_is_the_loop_over_calls(options, model_qkv):
    """Of options that the oracle takes: there each of them is exact."""
    out = mapped(model_qkv, options)
    for b in range(B):
        one = (x[b] for x in model_qkv)
        assert_is_call(out[b], one, element(options, b))


def assert_is_call(out, qkv, options):
    """That out is one call's, by the oracle where that takes the options, else by the call."""
    qkv = tuple(qkv)
    if isinstance(options.get("mask"), Mask) or "dropout_rng" in options:
        np.testing.assert_allclose(out, attention(*qkv, **options), rtol=0, atol=1e-6)
        return
    exact, plain = (oracle.attention(*qkv, **options, dtype=d)[0] for d in (None, np.float32))
    assert max_error(out, exact) <= error_bound(plain, exact, np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": np.float32([0.1, 1, 3]), "logits_soft_cap": np.float32([0.5, 2, 30])},
        {
            "sinks": RNG.standard_normal((B, N)).astype(np.float32),
            "alibi_slopes": RNG.random((B, N)).astype(np.float32),
        },
        {
            "bias": RNG.standard_normal((B, T, S)).astype(np.float32),
            "mask": WindowMask(2, 1, np.array([0, 5, -4])) | PredicateMask(parity),
        },
        {"dropout_rate": 0.4, "dropout_rng": jax.random.split(jax.random.key(1), B)},
    ],
    ids=lambda options: "+".join(options),
)
def test_vmap_over_an_option_is_a_loop(options, model_qkv):
    """The queries and keys are shared, so that only the option has the vmapped axis."""
    q, k, v = (x[0] for x in model_qkv)
    out = mapped((q, k, v), options, in_axes=(None, None, None))
    assert out.shape == (B, T, N, 3)
    for b in range(B):
        assert_is_call(out[b], (q, k, v), element(options, b))
        assert np.abs(out[b] - out[b - 1]).max() > 1e-3


def test_vmaps_nest_and_share(model_qkv):
    q, k, v = model_qkv
    lengths, offsets = np.array([4, 13]), np.array([0, 3, -2])

    def call(q, k, v, length, offset):
        return attention(q, k, v, key_value_seq_lengths=length, is_causal=True, query_offset=offset)

    inner = jax.vmap(call, in_axes=(None, None, None, 0, None))
    out = jax.vmap(inner, in_axes=(0, 0, None, None, 0))(q, k, v[0], lengths, offsets)
    for i, j in np.ndindex(B, 2):
        one = call(q[i], k[i], v[0], lengths[j], offsets[i])
        np.testing.assert_allclose(out[i, j], one, rtol=0, atol=1e-6)


def test_vmap_of_a_batched_call_folds_both_axes(model_qkv):
    q, k, v = (np.stack([x, x[::-1]]) for x in model_qkv)
    lengths = np.array([2, 13, 7])
    bias = RNG.standard_normal((2, 1, N, 1, S)).astype(np.float32)

    def call(q, k, v, bias):
        return attention(q, k, v, bias, key_value_seq_lengths=lengths)

    out = jax.vmap(call)(q, k, v, bias)
    for i in range(2):
        one = call(q[i], k[i], v[i], bias[i])
        np.testing.assert_allclose(out[i], one, rtol=0, atol=1e-6)


def test_an_empty_batch_gives_an_empty_output(model_qkv):
    empty = [x[:0] for x in model_qkv]
    lengths = np.zeros(0, np.int32)
    assert attention(*empty, key_value_seq_lengths=lengths).shape == (0, T, N, 3)
    nested = [np.stack([x, x]) for x in empty]
    assert jax.vmap(attention)(*nested).shape == (2, 0, T, N, 3)


def test_one_dropout_key_drops_the_same_in_every_vmapped_call(model_qkv):
    """Elements of the batch are counted within a call: a batched call drops differently."""
    q, k, v = (x[:1] for x in model_qkv)
    same = [np.repeat(x, B, 0) for x in (q, k, v)]
    dropped = functools.partial(attention, dropout_rate=0.4, dropout_rng=jax.random.key(3))
    one = dropped(q[0], k[0], v[0])
    for out in jax.vmap(dropped)(*same):
        np.testing.assert_allclose(out, one, rtol=0, atol=1e-6)
    batched = dropped(*same)
    np.testing.assert_allclose(batched[0], one, rtol=0, atol=1e-6)
    assert np.abs(batched[1] - one).max() > 1e-2


def test_merged_parts_can_be_vmapped(model_qkv):
    q, k, v = model_qkv[0], model_qkv[1][:, 1:], model_qkv[2][:, 1:]

    def halves(q, k, v):
        parts = [flash_attention_with_lse(q, k[part], v[part]) for part in (slice(6), slice(6, 12))]
        return merge_attention(*zip(*parts, strict=True))[0]

    out = jax.vmap(halves)(q, k, v)
    np.testing.assert_allclose(out, attention(q, k, v), rtol=0, atol=1e-6)
