"""Errors of the kernels and of their config name the argument."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from refusals import refused

from flash_jax import (
    BlockSizes,
    FlashAttentionConfig,
    block_schedule,
    flash_attention_forward,
    flash_mha,
    reference_attention,
)

CONFIG = FlashAttentionConfig.for_head_dim(4)
Q, K, V = (
    np.ones((6, 5, 4), np.float32),
    np.ones((3, 7, 4), np.float32),
    np.ones((3, 7, 2), np.float32),
)


def mha(q=Q, k=K, v=V, config=CONFIG):
    return flash_mha(config, q, k, v)


def forward(q=Q[0], k=K[0], v=V[0], config=CONFIG):
    return flash_attention_forward(config, q, k, v)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mha(q=Q[0]), ValueError, r"q must be \(N, T, H\); its shape is \(5, 4\)"),
        (lambda: mha(q=Q[None]), ValueError, r"q must be \(N, T, H\); its shape is \(1, 6, 5, 4\)"),
        (lambda: mha(q=Q[..., :3]), ValueError, r"q must be .* = \(any, any, 4\); .* \(6, 5, 3\)"),
        (lambda: mha(k=K[..., :3]), ValueError, r"k must be .* = \(any, any, 4\); .* \(3, 7, 3\)"),
        (lambda: mha(k=K[0]), ValueError, r"k must be .*; its shape is \(7, 4\)"),
        (lambda: mha(v=V[:, :6]), ValueError, r"v must be .* = \(3, 7, any\); .* \(3, 6, 2\)"),
        (lambda: mha(v=V[:2]), ValueError, r"v must be .* = \(3, 7, any\); .* \(2, 7, 2\)"),
        (lambda: mha(v=V[0]), ValueError, r"v must be .*; its shape is \(7, 2\)"),
        (lambda: mha(q=Q[:5]), ValueError, r"q heads must be a multiple of k heads; got N=5, K=3"),
        (lambda: mha(k=K[:0], v=V[:0]), ValueError, r"q heads must be a multiple of k heads.*K=0"),
        (lambda: mha(v=V.astype(jnp.bfloat16)), ValueError, r"v must have the dtype of q, float32"),
        (lambda: mha(q=Q.astype(np.int8)), TypeError, r"q must be one of float32.*dtype is int8"),
        (lambda: mha(k=K.astype(bool)), TypeError, r"k must be one of float32.*dtype is bool"),
        (lambda: mha(q=Q.tolist()), TypeError, r"q must be an array; it is list"),
        (lambda: mha(v=None), TypeError, r"v must be an array; it is NoneType"),
        (
            lambda: mha(config=(64, 64, 4)),
            TypeError,
            r"config must be a FlashAttentionConfig.*tuple",
        ),
        (lambda: forward(q=Q), ValueError, r"q must be \(T, H\); its shape is \(6, 5, 4\)"),
        (lambda: forward(k=K), ValueError, r"k must be .*; its shape is \(3, 7, 4\)"),
        (lambda: forward(k=K[0, :, :2]), ValueError, r"k must be .* = \(any, 4\); .* \(7, 2\)"),
        (lambda: forward(v=V[0, :3]), ValueError, r"v must be .* = \(7, any\); .* \(3, 2\)"),
        (lambda: reference_attention(Q[0], K, V), ValueError, r"query must be \(B, T, N, H\)"),
        (lambda: reference_attention(Q, K, V), ValueError, r"query heads must be a multiple"),
        (lambda: FlashAttentionConfig(0, 1, 1), ValueError, r"block_size_q must be > 0; it is 0"),
        (
            lambda: FlashAttentionConfig(1, -1, 1),
            ValueError,
            r"block_size_kv must be > 0; it is -1",
        ),
        (lambda: FlashAttentionConfig(1, 1, 0), ValueError, r"head_dim must be > 0; it is 0"),
        (lambda: FlashAttentionConfig(1.5, 1, 1), TypeError, r"block_size_q must be an integer"),
        (lambda: FlashAttentionConfig(True, 1, 1), TypeError, r"block_size_q must be an integer"),
        (
            lambda: FlashAttentionConfig(1, 1, 1, causal=1),
            TypeError,
            r"causal must be a bool; it is 1",
        ),
        (
            lambda: FlashAttentionConfig(1, 1, 1, False, 0.0),
            ValueError,
            r"softmax_scale must be .* > 0",
        ),
        (lambda: FlashAttentionConfig(1, 1, 1, False, -1.0), ValueError, r"softmax_scale must be"),
        (
            lambda: FlashAttentionConfig(1, 1, 1, False, np.inf),
            ValueError,
            r"softmax_scale must be",
        ),
        (
            lambda: FlashAttentionConfig(1, 1, 1, False, np.nan),
            ValueError,
            r"softmax_scale must be",
        ),
        (
            lambda: FlashAttentionConfig(1, 1, 1, False, 10**400),
            ValueError,
            r"softmax_scale must be finite in float32 and > 0; it is inf",
        ),
        (
            lambda: FlashAttentionConfig(1, 1, 1, False, "1"),
            TypeError,
            r"softmax_scale must be a real",
        ),
        (
            lambda: FlashAttentionConfig.auto(64, 0, 5),
            ValueError,
            r"seq_len_q must be > 0; it is 0",
        ),
        (
            lambda: FlashAttentionConfig.auto(64, 5, 2.0),
            TypeError,
            r"seq_len_kv must be an integer",
        ),
        (lambda: FlashAttentionConfig.auto(-1, 5, 5), ValueError, r"head_dim must be > 0"),
        (lambda: block_schedule("causal", 5, 5, (2, 2)), TypeError, r"mask must be a Mask or None"),
        (lambda: block_schedule(None, 0, 5, (2, 2)), ValueError, r"T must be > 0; it is 0"),
        (lambda: block_schedule(None, 5, 5, (2, 0)), ValueError, r"block_sizes.kv must be > 0"),
        (lambda: block_schedule(None, 5, 5, 2), TypeError, r"block_sizes must be a pair"),
    ],
)
def test_an_error_names_the_argument_what_it_must_be_and_what_it_is(call, error, message):
    with refused(error, message):
        call()


def test_errors_are_raised_at_trace_time():
    with refused(ValueError, "v must be"):
        jax.eval_shape(mha, Q, K, V[:, :6])


def test_config_is_frozen_hashable_and_compares_by_value():
    assert FlashAttentionConfig(8, 8, 4) == FlashAttentionConfig(
        8, np.int64(8), 4, softmax_scale=0.5
    )
    assert len({FlashAttentionConfig(8, 8, 4), FlashAttentionConfig(8, 8, 4)}) == 1
    with pytest.raises(AttributeError):
        CONFIG.causal = True  # pyright: ignore[reportAttributeAccessIssue]


def test_config_constructors():
    assert FlashAttentionConfig.for_head_dim(16).block_sizes == BlockSizes(64, 64)
    assert FlashAttentionConfig.for_long_sequence(16).block_sizes == BlockSizes(32, 128)
    for make in (FlashAttentionConfig.for_head_dim, FlashAttentionConfig.for_long_sequence):
        assert make(16).softmax_scale == 0.25
        assert not make(16).causal
        assert make(16, causal=True, softmax_scale=2).softmax_scale == 2.0
