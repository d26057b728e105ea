import functools

import jax
import numpy as np
import pytest
from jax import export, lax
from jax import numpy as jnp
from oracle import random_qkv

from flash_jax import (
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
    flash_attention,
    flash_attention_forward,
    flash_attention_with_lse,
    flash_mha,
    merge_attention,
)

CONFIG = FlashAttentionConfig(16, 8, 5, causal=True)
mha = functools.partial(flash_mha, CONFIG)


@pytest.fixture
def qkv(rng):
    return random_qkv(rng, lead=(3,), N=4, K=2, T=37, S=41, H=5)


def test_vmap_is_a_loop_over_the_batch(qkv):
    expected = jnp.stack([mha(*(x[i] for x in qkv)) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(mha)(*qkv), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(mha))(*qkv), expected)
    moved = jax.vmap(mha, in_axes=(1, 0, 2), out_axes=3)(
        jnp.moveaxis(qkv[0], 0, 1), qkv[1], jnp.moveaxis(qkv[2], 0, 2)
    )
    np.testing.assert_array_equal(jnp.moveaxis(moved, 3, 0), expected)


def test_vmap_leaves_shared_arguments_alone(qkv):
    q, k, v = qkv
    expected = jnp.stack([mha(q[i], k[0], v[0]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(mha, in_axes=(0, None, None))(q, k[0], v[0]), expected)
    nested = jax.vmap(jax.vmap(mha, in_axes=(None, 0, 0)), in_axes=(0, None, None))(*qkv)
    for i, j in np.ndindex(3, 3):
        np.testing.assert_array_equal(nested[i, j], mha(q[i], k[j], v[j]))


def test_vmap_over_heads_of_the_single_head_kernel(qkv):
    q, k, v = (x[0] for x in qkv)
    one = functools.partial(flash_attention_forward, CONFIG)
    np.testing.assert_allclose(jax.vmap(one)(q[:2], k, v), mha(q[:2], k, v), atol=1e-6)


def test_scan_over_layers(qkv):
    q, k, v = qkv
    _, scanned = lax.scan(lambda carry, x: (carry, mha(*x)), None, qkv)
    np.testing.assert_array_equal(scanned, jax.vmap(mha)(q, k, v))


def test_export_round_trip(qkv):
    q, k, v = (x[0] for x in qkv)
    exported = export.export(jax.jit(mha))(q, k, v)
    reloaded = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(reloaded.call(q, k, v), mha(q, k, v))


def test_a_second_call_of_the_same_shapes_does_not_trace(qkv):
    traces = []

    @jax.jit
    def counted(q, k, v):
        traces.append(q.shape)
        return mha(q, k, v)

    for _ in range(3):
        counted(*(x[0] for x in qkv))
    assert len(traces) == 1


def test_eager_calls_are_compiled_once(qkv):
    q, k, v = (x[0] for x in qkv)
    config = FlashAttentionConfig(13, 9, 5)  # of no other test
    with jax.log_compiles(False):
        flash_mha(config, q, k, v)
        with jax.no_tracing():
            flash_mha(config, q, k, v)


def test_config_is_a_static_argument(qkv):
    jitted = jax.jit(flash_mha, static_argnums=0)
    q, k, v = (x[0] for x in qkv)
    np.testing.assert_array_equal(jitted(CONFIG, q, k, v), mha(q, k, v))


def test_strict_modes_of_jax(qkv):
    q, k, v = (x[0] for x in qkv)
    expected = mha(q, k, v)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    ):
        np.testing.assert_array_equal(mha(q, k, v), expected)


# Model level: arrays are (B, T, N, H), and options are vmapped with them.

B, T, S, N, K, H = 3, 11, 13, 4, 2, 5
attention = functools.partial(flash_attention, block_sizes=(4, 3))


@pytest.fixture
def model_qkv(rng):
    return tuple(
        np.swapaxes(x, 1, 2) for x in random_qkv(rng, lead=(B,), N=N, K=K, T=T, S=S, H=H, Hv=3)
    )


def parity(b, h, q_index, k_index):
    return (b + h + q_index + k_index) % 2 == 0


_rng = np.random.default_rng(20220527)
# Arrays with a first axis B, as a batched call takes them and as vmap splits them.
BATCHED = {
    "lengths and offset": {
        "query_seq_lengths": np.array([11, 0, 7]),
        "key_value_seq_lengths": np.array([13, 5, 0]),
        "query_offset": np.array([2, -3, 0]),
        "is_causal": True,
        "local_window_size": 4,
    },
    "bias and bool mask": {
        "bias": _rng.standard_normal((B, N, T, S)).astype(np.float32),
        "mask": _rng.random((B, 1, T, S)) < 0.6,
    },
    "segments": {
        "query_segment_ids": _rng.integers(0, 2, (B, T)),
        "key_value_segment_ids": _rng.integers(0, 2, (B, S)),
    },
    "alibi": {"query_offset": np.array([2, -3, 0]), "alibi_slopes": np.float32([1, 0.5, 2, 0.1])},
    "Mask": {
        "mask": (PrefixMask(np.array([0, 2, 9])) | CausalMask(np.array([2, -3, 0])))
        & SegmentMask(_rng.integers(0, 2, (B, T)), np.zeros((B, S), np.int32))
        & LengthMask(None, np.array([13, 9, 2]))
    },
}


def split(options):
    """in_axes of the options: 0 where the first axis is B."""
    return {name: jax.tree.map(axis_of, x) for name, x in options.items()}


def axis_of(x):
    return 0 if np.ndim(x) and np.shape(x)[0] == B else None


def element(options, b):
    return jax.tree.map(lambda x: x[b] if axis_of(x) == 0 else x, options)


def traced(options):
    """The options that are arrays, and those that are not."""
    static = {"is_causal", "local_window_size", "dropout_rate"}
    return (
        {name: x for name, x in options.items() if name not in static},
        {name: x for name, x in options.items() if name in static},
    )


def mapped(qkv, options, in_axes=(0, 0, 0)):
    arrays, static = traced(options)
    call = lambda q, k, v, arrays: attention(q, k, v, **arrays, **static)  # noqa: E731
    return jax.vmap(call, in_axes=(*in_axes, split(arrays)))(*qkv, arrays)


@pytest.mark.parametrize("options", BATCHED.values(), ids=BATCHED)
def test_vmap_is_the_batched_call_and_the_loop(options, model_qkv):
    out = mapped(model_qkv, options)
    np.testing.assert_allclose(out, attention(*model_qkv, **options), rtol=0, atol=1e-6)
    for b in range(B):
        one = attention(*(x[b] for x in model_qkv), **element(options, b))
        np.testing.assert_allclose(out[b], one, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": np.float32([0.1, 1, 3]), "logits_soft_cap": np.float32([0.5, 2, 30])},
        {
            "sinks": _rng.standard_normal((B, N)).astype(np.float32),
            "alibi_slopes": _rng.random((B, N)).astype(np.float32),
        },
        {
            "bias": _rng.standard_normal((B, T, S)).astype(np.float32),
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
        one = attention(q, k, v, **element(options, b))
        np.testing.assert_allclose(out[b], one, rtol=0, atol=1e-6)
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
    bias = _rng.standard_normal((2, 1, N, 1, S)).astype(np.float32)

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


def test_scan_over_layers_of_a_model(model_qkv):
    x = np.tile(model_qkv[1][:, :, :1], (1, 1, N, 1))
    weights = _rng.standard_normal((4, H, H)).astype(np.float32) / H**0.5
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
    whole = attention(q, k, v, is_causal=True)
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


def test_every_option_gives_the_same_bits_jitted_and_in_the_strict_modes_of_jax(model_qkv):
    arrays, static = traced(EVERYTHING)
    call = lambda *qkv, **arrays: flash_attention_with_lse(*qkv, **arrays, **static)  # noqa: E731
    eager = call(*model_qkv, **arrays)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
    ):
        jitted = jax.jit(call)(*model_qkv, **arrays)
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_array_equal(a, b)


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
    np.testing.assert_array_equal(donating(query, k, k), attention(q, k, k))
    assert query.is_deleted()


def test_merged_parts_can_be_vmapped(model_qkv):
    q, k, v = model_qkv[0], model_qkv[1][:, 1:], model_qkv[2][:, 1:]

    def halves(q, k, v):
        parts = [flash_attention_with_lse(q, k[part], v[part]) for part in (slice(6), slice(6, 12))]
        return merge_attention(*zip(*parts, strict=True))[0]

    out = jax.vmap(halves)(q, k, v)
    np.testing.assert_allclose(out, attention(q, k, v), rtol=0, atol=1e-6)
