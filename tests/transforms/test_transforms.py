"""Calls under scan, export and jit: traced once, and taking other lengths."""

import functools

import jax
import numpy as np
import oracle
import pytest
from batched import BATCHED, RNG, B, H, N, T, attention, traced
from jax import export, lax
from jax import numpy as jnp

from flash_jax import CausalMask, PrefixMask, WindowMask, flash_attention_with_lse


def test_scan_over_layers_of_a_model(model_qkv):
    x = np.tile(model_qkv[1][:, :, :1], (1, 1, N, 1))
    weights = RNG.standard_normal((4, H, H)).astype(np.float32) / H**0.5
    lengths = np.array([13, 4, 8])

    def layer(x, w):
        mixed = attention(x @ w, x, x, is_causal=True, key_value_seq_lengths=lengths)
        return x + mixed, None

    scanned, _ = jax.jit(lambda x, w: lax.scan(layer, x, w))(x, weights)
    for w in weights:
        x, _ = layer(x, w)
    np.testing.assert_allclose(scanned, x, rtol=0, atol=1e-5)


def test_an_exported_call_takes_other_lengths_and_offsets(model_qkv):
    @jax.jit
    def call(q, k, v, lengths, offset):
        return attention(
            q, k, v, key_value_seq_lengths=lengths, query_offset=offset, is_causal=True
        )

    arguments = *model_qkv, np.array([13, 2, 0], np.int32), np.int32(0)
    exported = export.deserialize(export.export(call)(*arguments).serialize())
    for lengths, offset in [([13, 2, 0], 0), ([1, 5, 13], 4)]:
        arguments = *model_qkv, np.array(lengths, np.int32), np.int32(offset)
        np.testing.assert_array_equal(exported.call(*arguments), call(*arguments))


def test_an_exported_call_takes_masks(model_qkv):
    call = jax.jit(lambda q, k, v, mask: attention(q, k, v, mask=mask))
    mask = (PrefixMask(np.int32(2)) | CausalMask(np.int32(1))) & WindowMask(4, None, np.int32(0))
    exported = export.deserialize(export.export(call)(*model_qkv, mask).serialize())
    np.testing.assert_array_equal(exported.call(*model_qkv, mask), call(*model_qkv, mask))


def test_other_offsets_and_lengths_do_not_trace_again(model_qkv):
    def call(offset, length, cap, scale):
        lengths = np.full(B, length)
        return attention(
            *model_qkv,
            query_offset=offset,
            is_causal=True,
            key_value_seq_lengths=lengths,
            logits_soft_cap=cap,
            scale=scale,
        )

    first = call(0, 1, 1.0, 0.5)
    with jax.no_tracing():
        last = [call(n, n + 1, n + 1.0, 1 / (n + 1)) for n in range(4)][-1]
    assert np.abs(first - last).max() > 1e-3


def test_a_jitted_decoder_step_is_traced_once(model_qkv):
    traces = []

    @jax.jit
    def step(q, k, v, position):
        traces.append(position)
        return attention(q, k, v, is_causal=True, query_offset=position)

    q, k, v = model_qkv
    steps = [step(q[:, t : t + 1], k, v, t)[:, 0] for t in range(T)]
    assert len(traces) == 1
    whole, _ = oracle.attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(np.stack(steps, 1), whole, rtol=0, atol=1e-6)


EVERYTHING = {
    "bias": BATCHED["bias and bool mask"]["bias"],
    "mask": BATCHED["Mask"]["mask"],
    "is_causal": True,
    "query_offset": np.array([4, 1, 0], np.int32),
    "local_window_size": (6, None),
    "query_seq_lengths": np.array([11, 5, 0], np.int32),
    "sinks": np.ones(N, np.float32),
    "alibi_slopes": np.float32([1, 0.5, 2, 0.1]),
    "logits_soft_cap": 5.0,
    "scale": 0.7,
    "dropout_rate": 0.3,
    "dropout_rng": jax.random.key(2),
}


@pytest.mark.usefixtures("x64")
def test_every_option_keeps_float32_under_x64(model_qkv):
    call = functools.partial(flash_attention_with_lse, **EVERYTHING)
    assert [x.dtype for x in jax.eval_shape(call, *model_qkv)] == [np.float32, np.float32]


def test_shapes_and_jaxprs_need_no_values(model_qkv):
    arrays, static = traced(EVERYTHING)
    call = lambda *qkv, **arrays: flash_attention_with_lse(*qkv, **arrays, **static)  # noqa: E731
    with jax.transfer_guard("disallow_explicit"):
        out, lse = jax.eval_shape(call, *model_qkv, **arrays)
    assert (out.shape, lse.shape) == ((B, T, N, 3), (B, N, T))
    jaxpr = jax.make_jaxpr(call)(*model_qkv, **arrays)
    assert [aval.shape for aval in jaxpr.out_avals] == [out.shape, lse.shape]


def test_the_output_can_take_the_memory_of_a_donated_query(model_qkv):
    q, k, _ = model_qkv
    donating = jax.jit(attention, donate_argnums=0)
    query = jnp.asarray(q)
    out = donating(query, k, k)
    np.testing.assert_allclose(out, oracle.attention(q, k, k)[0], rtol=0, atol=1e-6)
    assert query.is_deleted()
