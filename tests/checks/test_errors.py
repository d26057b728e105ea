import contextlib
import re
from fractions import Fraction

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from flash_jax import (
    BlockSizes,
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
    block_schedule,
    dot_product_attention,
    flash_attention,
    flash_attention_forward,
    flash_attention_int8,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
    flash_mha,
    merge_attention,
    reference_attention,
)

CONFIG = FlashAttentionConfig.for_head_dim(4)
Q, K, V = (
    np.ones((6, 5, 4), np.float32),
    np.ones((3, 7, 4), np.float32),
    np.ones((3, 7, 2), np.float32),
)


@contextlib.contextmanager
def refused(error, message):
    """An error whose text begins with our sentence, which begins with the argument's name."""
    with pytest.raises(error) as caught:
        yield
    assert re.match(message, str(caught.value)), str(caught.value)


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


# Model level. Sizes are distinct, so that no array fits by accident.

B, T, S, N, NK, H = 2, 5, 7, 6, 3, 4
QUERY = np.ones((B, T, N, H), np.float32)
KEY = np.ones((B, S, NK, H), np.float32)
VALUE = np.ones((B, S, NK, 2), np.float32)
RNG = jax.random.key(0)


def f32(*shape):
    return np.ones(shape, np.float32)


def i32(*shape):
    return np.ones(shape, np.int32)


def attend(query=QUERY, key=KEY, value=VALUE, **options):
    return flash_attention_with_lse(query, key, value, **options)


def unbatched(**options):
    return flash_attention(QUERY[0], KEY[0], VALUE[0], **options)


# The arguments of a call, the error, what the last of them must be, and what it is.
BAD_ARRAYS = [
    ({"query": QUERY[0, 0]}, ValueError, "(B, T, N, H) or (T, N, H)", "its shape is (6, 4)"),
    (
        {"query": QUERY[None]},
        ValueError,
        "(B, T, N, H) or (T, N, H)",
        "its shape is (1, 2, 5, 6, 4)",
    ),
    ({"query": QUERY.tolist()}, TypeError, "an array", "it is list"),
    ({"query": None}, TypeError, "an array", "it is NoneType"),
    ({"query": QUERY.astype(np.int32)}, TypeError, "one of float32", "its dtype is int32"),
    ({"query": QUERY.astype(np.complex64)}, TypeError, "one of float32", "its dtype is complex64"),
    (
        {"query": QUERY.astype(jnp.float8_e4m3fn)},
        TypeError,
        "one of float32",
        "its dtype is float8_e4m3fn",
    ),
    ({"key": KEY[0]}, ValueError, "(B of query, S, K, H of query)", "its shape is (7, 3, 4)"),
    ({"key": KEY[:1]}, ValueError, "(2, any, any, 4)", "its shape is (1, 7, 3, 4)"),
    ({"key": KEY[..., :3]}, ValueError, "(2, any, any, 4)", "its shape is (2, 7, 3, 3)"),
    ({"key": KEY.astype(np.float16)}, ValueError, "the dtype of query, float32", "it is float16"),
    (
        {"value": VALUE[:, :3]},
        ValueError,
        "(B of query, S of key, K of key, Hv) = (2, 7, 3, any)",
        "its shape is (2, 3, 3, 2)",
    ),
    ({"value": VALUE[:, :, :1]}, ValueError, "(2, 7, 3, any)", "its shape is (2, 7, 1, 2)"),
    (
        {"value": VALUE[0]},
        ValueError,
        "(B of query, S of key, K of key, Hv)",
        "its shape is (7, 3, 2)",
    ),
    ({"value": VALUE.astype(bool)}, TypeError, "one of float32", "its dtype is bool"),
    ({"bias": f32(T, S).astype(int)}, TypeError, "floats", "its dtype is int32"),
    ({"bias": np.ones((T, S), bool)}, TypeError, "floats", "its dtype is bool"),
    ({"bias": [[1.0, 2.0]]}, ValueError, "(B, N, T, S) = (2, 6, 5, 7)", "its shape is (1, 2)"),
    ({"bias": [[1.0], [1.0, 2.0]]}, TypeError, "lists of one length", "it is [[1.0], [1.0, 2.0]]"),
    ({"bias": [1.0, None]}, TypeError, "hold real numbers", "it is [1.0, None]"),
    ({"bias": {}}, TypeError, "a list of numbers, an array or None", "it is dict"),
    (
        {"bias": f32(T, S + 1)},
        ValueError,
        "broadcast to (B, N, T, S) = (2, 6, 5, 7)",
        "its shape is (5, 8)",
    ),
    (
        {"bias": f32(1, NK, T, S)},
        ValueError,
        "broadcast to (B, N, T, S) = (2, 6, 5, 7)",
        "its shape is (1, 3, 5, 7)",
    ),
    (
        {"bias": f32(1, 1, 1, T, S)},
        ValueError,
        "broadcast to (B, N, T, S) = (2, 6, 5, 7)",
        "its shape is (1, 1, 1, 5, 7)",
    ),
    ({"mask": i32(T, S)}, TypeError, "bool", "its dtype is int32"),
    ({"mask": f32(T, S)}, TypeError, "bool", "its dtype is float32"),
    ({"mask": 1}, TypeError, "bool", "its dtype is int32"),
    ({"mask": "causal"}, TypeError, "an array", "it is str"),
    ({"mask": [[1] * S]}, TypeError, "bool", "its dtype is int32"),
    ({"mask": [CausalMask()]}, TypeError, "hold real numbers", "it is [CausalMask(offset=0)]"),
    ({"mask": CausalMask}, TypeError, "an array", "it is type"),
    (
        {"mask": np.ones((T + 1, S), bool)},
        ValueError,
        "broadcast to (B, N, T, S) = (2, 6, 5, 7)",
        "its shape is (6, 7)",
    ),
    (
        {"mask": np.ones((3, 1, T, S), bool)},
        ValueError,
        "broadcast to (B, N, T, S)",
        "its shape is (3, 1, 5, 7)",
    ),
    (
        {"mask": np.ones((1, 1, 1, T, S), bool)},
        ValueError,
        "broadcast to (B, N, T, S)",
        "its shape is (1, 1, 1, 5, 7)",
    ),
    ({"scale": "1"}, TypeError, "an array or None", "it is str"),
    ({"scale": np.array(["1"])}, TypeError, "hold real numbers", "it is ['1']"),
    ({"scale": True}, TypeError, "real numbers", "its dtype is bool"),
    ({"scale": 1j}, TypeError, "an array or None", "it is complex"),
    ({"scale": f32(3)}, ValueError, "(2)", "its shape is (3,)"),
    ({"scale": f32(2, 1)}, ValueError, "a scalar or (B,)", "its shape is (2, 1)"),
    ({"query_seq_lengths": f32(B)}, TypeError, "integers", "its dtype is float32"),
    ({"query_seq_lengths": np.ones(B, bool)}, TypeError, "integers", "its dtype is bool"),
    ({"query_seq_lengths": [1, 2, 3]}, ValueError, "(B", "its shape is (3,)"),
    ({"query_seq_lengths": (1.0, 2)}, TypeError, "integers", "its dtype is float32"),
    ({"query_seq_lengths": ["1", "2"]}, TypeError, "hold real numbers", "it is ['1', '2']"),
    ({"key_value_seq_lengths": [1, 2**40]}, ValueError, "fit into int32", f"it is {2**40}"),
    ({"query_offset": np.array([-(2**40), 1])}, ValueError, "fit into int32", f"it is {-(2**40)}"),
    ({"query_offset": [2**70, 1]}, TypeError, "integers", "its dtype is float32"),
    ({"query_offset": 10**5000}, ValueError, "fit into int32", "it is an integer of 16610 bits"),
    ({"query_offset": Fraction(3)}, TypeError, "integers", "its dtype is float32"),
    ({"query_seq_lengths": i32(3)}, ValueError, "(B", "its shape is (3,)"),
    ({"key_value_seq_lengths": 1.5}, TypeError, "integers", "its dtype is float32"),
    ({"key_value_seq_lengths": i32(3)}, ValueError, "(B", "its shape is (3,)"),
    ({"query_offset": 1.0}, TypeError, "integers", "its dtype is float32"),
    ({"query_offset": True}, TypeError, "integers", "its dtype is bool"),
    ({"query_offset": "1"}, TypeError, "an array", "it is str"),
    ({"query_offset": i32(3)}, ValueError, "(B", "its shape is (3,)"),
    ({"logits_soft_cap": 0}, ValueError, "> 0", "it is 0"),
    ({"logits_soft_cap": jnp.float32(-2)}, ValueError, "> 0", "it is -2.0"),
    ({"logits_soft_cap": np.nan}, ValueError, "> 0", "it is nan"),
    ({"logits_soft_cap": np.inf}, ValueError, "finite", "it is inf"),
    ({"logits_soft_cap": "30"}, TypeError, "an array or None", "it is str"),
    ({"logits_soft_cap": True}, TypeError, "real numbers", "its dtype is bool"),
    ({"sinks": i32(N)}, TypeError, "floats", "its dtype is int32"),
    ({"sinks": [1] * N}, TypeError, "floats", "its dtype is int32"),
    ({"sinks": Fraction(1, 2)}, ValueError, "(N", "its shape is ()"),
    ({"sinks": 1.0}, ValueError, "(N", "its shape is ()"),
    ({"sinks": f32(NK)}, ValueError, "(N", "its shape is (3,)"),
    ({"sinks": f32(3, N)}, ValueError, "(B, N)", "its shape is (3, 6)"),
    ({"alibi_slopes": i32(N)}, TypeError, "floats", "its dtype is int32"),
    ({"alibi_slopes": 1.0}, ValueError, "(N", "its shape is ()"),
    ({"alibi_slopes": f32(NK)}, ValueError, "(N", "its shape is (3,)"),
]
BAD_STATICS = [
    ({"is_causal": 1}, TypeError, "a bool", "it is 1"),
    ({"is_causal": None}, TypeError, "a bool", "it is None"),
    ({"is_causal": np.array(True)}, TypeError, "a bool", "it is array(True)"),
    ({"local_window_size": -1}, ValueError, ">= 0", "it is -1"),
    ({"local_window_size": (0, -1)}, ValueError, ">= 0", "it is -1"),
    (
        {"local_window_size": (1, 2, 3)},
        ValueError,
        "an integer or (left, right)",
        "it is (1, 2, 3)",
    ),
    ({"local_window_size": 1.0}, TypeError, "an integer or None", "it is 1.0"),
    ({"local_window_size": (1, "2")}, TypeError, "an integer or None", "it is '2'"),
    ({"local_window_size": True}, TypeError, "an integer or None", "it is True"),
    (
        {"local_window_size": np.array([1, 2])},
        TypeError,
        "an integer or None",
        "it is array([1, 2])",
    ),
    ({"dropout_rng": RNG, "dropout_rate": -0.1}, ValueError, "in [0, 1)", "it is -0.1"),
    ({"dropout_rng": RNG, "dropout_rate": 1.0}, ValueError, "in [0, 1)", "it is 1.0"),
    ({"dropout_rng": RNG, "dropout_rate": np.nan}, ValueError, "in [0, 1)", "it is nan"),
    ({"dropout_rng": RNG, "dropout_rate": "0.5"}, TypeError, "a number", "it is '0.5'"),
    ({"dropout_rng": RNG, "dropout_rate": None}, TypeError, "a number", "it is None"),
    ({"dropout_rng": RNG, "dropout_rate": True}, TypeError, "a number", "it is True"),
    (
        {"dropout_rate": 0.5, "dropout_rng": None},
        ValueError,
        "given where dropout_rate is > 0",
        "it is None",
    ),
    ({"dropout_rate": 0.5, "dropout_rng": 0}, TypeError, "one PRNG key", "it is 0"),
    ({"dropout_rng": 0}, TypeError, "one PRNG key", "it is 0"),
    (
        {"dropout_rate": 0.5, "dropout_rng": f32(2)},
        TypeError,
        "one PRNG key",
        "it is array([1., 1.], dtype=float32)",
    ),
    (
        {"dropout_rate": 0.5, "dropout_rng": jax.random.split(RNG)},
        TypeError,
        "one PRNG key",
        "it is Array((2,)",
    ),
    ({"broadcast_dropout": None}, TypeError, "a bool, known at trace time", "it is None"),
    ({"broadcast_dropout": 1}, TypeError, "a bool, known at trace time", "it is 1"),
    ({"block_sizes": 4}, TypeError, "a pair of integers", "it is 4"),
    ({"block_sizes": (4,)}, TypeError, "a pair of integers", "it is (4,)"),
    ({"block_sizes": (4, 4, 4)}, TypeError, "a pair of integers", "it is (4, 4, 4)"),
    ({"block_sizes": np.array([4, 4])}, TypeError, "a pair of integers", "it is array([4, 4])"),
    ({"block_sizes": (0, 4)}, ValueError, "> 0", "it is 0"),
    ({"block_sizes": (4, -1)}, ValueError, "> 0", "it is -1"),
    ({"block_sizes": (4.0, 4)}, TypeError, "an integer", "it is 4.0"),
    ({"block_sizes": (4, True)}, TypeError, "an integer", "it is True"),
]


def name_options(case):
    return "-".join(case) if isinstance(case, dict) else None


@pytest.mark.parametrize(
    ("options", "error", "must_be", "it_is"), BAD_ARRAYS + BAD_STATICS, ids=name_options
)
def test_an_error_of_attention_names_the_argument(options, error, must_be, it_is):
    name = list(options)[-1]
    message = rf"{name}\S* must .*{re.escape(must_be)}.*; {re.escape(it_is)}"
    with refused(error, message):
        attend(**options)


@pytest.mark.parametrize(
    ("options", "must_be"),
    [
        ({"query_seq_lengths": i32(B)}, ""),
        ({"key_value_seq_lengths": i32(1)}, ""),
        ({"query_offset": i32(1)}, ""),
        ({"query_segment_ids": i32(1, T), "key_value_segment_ids": i32(S)}, "(T"),
        ({"key_value_segment_ids": i32(1, S), "query_segment_ids": i32(T)}, "(S"),
        ({"sinks": f32(1, N)}, "(N"),
        ({"bias": f32(B, 1, T, S)}, "broadcast to (1, N, T, S) = (1, 6, 5, 7)"),
        ({"mask": np.ones((B, 1, T, S), bool)}, "broadcast to (1, N, T, S) = (1, 6, 5, 7)"),
        ({"mask": CausalMask(i32(B))}, ""),
    ],
    ids=name_options,
)
def test_a_call_without_batch_takes_no_batched_arrays(options, must_be):
    name, x = next(iter(options.items()))
    name, x = ("CausalMask.offset", x.offset) if isinstance(x, CausalMask) else (name, x)
    message = f"{name} must .*{re.escape(must_be)}.*its shape is {re.escape(str(x.shape))}"
    with refused(ValueError, message):
        unbatched(**options)


@pytest.mark.parametrize(
    ("q_ids", "kv_ids", "error", "message"),
    [
        (i32(B, T), None, ValueError, "key_value_segment_ids must be given where query_segment_"),
        (None, i32(B, S), ValueError, "query_segment_ids must be given where key_value_segment_"),
        (i32(B, S), i32(B, S), ValueError, r"query_segment_ids must be \(B, T\) = \(2, 5\)"),
        (i32(B, T), i32(3, S), ValueError, r"key_value_segment_ids must be \(B, S\) = \(2, 7\)"),
        (i32(B, T, 1), i32(B, S), ValueError, r"query_segment_ids must be .* is \(2, 5, 1\)"),
        (i32(B, T), 1, ValueError, r"key_value_segment_ids must be .* is \(\)"),
        (f32(B, T), i32(B, S), TypeError, "query_segment_ids must be integers; .*float32"),
        (i32(B, T), np.ones((B, S), bool), TypeError, "key_value_segment_ids must be integers"),
    ],
)
def test_an_error_of_segment_ids_names_them(q_ids, kv_ids, error, message):
    with refused(error, message):
        attend(query_segment_ids=q_ids, key_value_segment_ids=kv_ids)


@pytest.mark.parametrize(
    "name",
    ["is_causal", "local_window_size", "dropout_rate", "broadcast_dropout", "block_sizes"],
)
def test_an_option_that_is_compiled_in_cannot_be_traced(name):
    with refused(TypeError, rf"{name}\S* must be .*Tracer"):
        jax.jit(lambda x: attend(**{name: (x, x) if name == "block_sizes" else x}))(1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CausalMask(1.5), TypeError, "CausalMask.offset must be integers; .*float32"),
        (lambda: CausalMask(i32(3)), ValueError, r"CausalMask.offset must be .*2.*; .*\(3,\)"),
        (lambda: CausalMask(i32(B, 1)), ValueError, r"CausalMask.offset must be .*\(2, 1\)"),
        (lambda: WindowMask(-1, 0), ValueError, "left must be >= 0; it is -1"),
        (lambda: WindowMask(0, -2), ValueError, "right must be >= 0; it is -2"),
        (lambda: WindowMask(1, 0.5), TypeError, "right must be an integer or None; it is 0.5"),
        (lambda: WindowMask(jnp.int32(1), 0), TypeError, "left must be an integer or None"),
        (lambda: WindowMask(1, 0, True), TypeError, "WindowMask.offset must be integers; .*bool"),
        (lambda: SegmentMask(i32(S), i32(S)), ValueError, r"SegmentMask.q_ids must .*\(7,\)"),
        (lambda: SegmentMask(i32(T), 1), ValueError, r"SegmentMask.kv_ids must .*\(\)"),
        (lambda: SegmentMask(i32(3, T), i32(S)), ValueError, r"SegmentMask.q_ids must .*\(3, 5\)"),
        (lambda: SegmentMask(f32(T), i32(S)), TypeError, "SegmentMask.q_ids must be integers"),
        (lambda: LengthMask(1.5), TypeError, "LengthMask.q must be integers; .*float32"),
        (lambda: LengthMask(kv=i32(3)), ValueError, r"LengthMask.kv must be .*\(3,\)"),
        (lambda: PrefixMask(True), TypeError, "PrefixMask.n must be integers; .*bool"),
        (lambda: CausalMask(2**31), ValueError, f"CausalMask.offset must fit .*; it is {2**31}"),
        (lambda: LengthMask([1, 2**40]), ValueError, "LengthMask.q must fit into int32"),
        (lambda: SegmentMask([1, [2]], 1), TypeError, r"SegmentMask.q_ids .*; it is \[1, \[2\]\]"),
        (
            lambda: PrefixMask(1) | (CausalMask() & LengthMask(kv=2.0)),
            TypeError,
            "LengthMask.kv must be integers; .*float32",
        ),
        (
            lambda: PredicateMask(lambda b, h, q_index, k_index: q_index - k_index),
            TypeError,
            "fn of PredicateMask must return bool; it returned int32",
        ),
    ],
)
def test_an_error_of_a_mask_names_its_field(make, error, message):
    with refused(error, message):
        attend(mask=make())


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        (lambda: CausalMask() & 1, "CausalMask.*int"),
        (lambda: CausalMask() | jnp.ones((T, S), bool), "CausalMask.*Array"),
        (lambda: np.ones((T, S), bool) & CausalMask(), "CausalMask"),
    ],
)
def test_a_mask_and_no_mask_do_not_combine(combine, message):
    with pytest.raises(TypeError, match=message):
        combine()


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask and LengthMask(kv=3),
        lambda mask: None or mask or LengthMask(kv=3),
        lambda mask: not mask,
        lambda mask: any([mask]),
    ],
)
@pytest.mark.parametrize("mask", [CausalMask(), CausalMask() & PrefixMask(2)])
def test_a_mask_is_no_bool(mask, use):
    with refused(TypeError, f"{type(mask).__name__} must not be used as a bool: .* by & and \\|"):
        use(mask)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CausalMask().to_array(0, 3), ValueError, "T must be > 0; it is 0"),
        (lambda: CausalMask().to_array(3, -1), ValueError, "S must be > 0; it is -1"),
        (lambda: CausalMask().to_array(2.0, 3), TypeError, "T must be an integer; it is 2.0"),
        (
            lambda: SegmentMask(i32(T), i32(S)).to_array(T, T),
            ValueError,
            r"\S*kv_ids must .*\(7,\)",
        ),
        (lambda: block_schedule(CausalMask, 5, 5, (2, 2)), TypeError, "mask must be a Mask.*type"),
        (
            lambda: block_schedule(np.tri(5), 5, 5, (2, 2)),
            TypeError,
            "mask must be a Mask.*ndarray",
        ),
        (
            lambda: block_schedule(None, 5, 5.0, (2, 2)),
            TypeError,
            "S must be an integer; it is 5.0",
        ),
        (
            lambda: block_schedule(SegmentMask(i32(T), i32(S)), S, S, (2, 2)),
            ValueError,
            r"SegmentMask.q_ids must be .*7.*; .*\(5,\)",
        ),
    ],
)
def test_an_error_of_a_look_at_a_mask_names_the_argument(call, error, message):
    with refused(error, message):
        call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"implementation": "cudnn"}, NotImplementedError, "implementation must be .* is 'cudnn'"),
        ({"implementation": "foo"}, ValueError, "implementation must be None or 'xla'; .*'foo'"),
        ({"return_residual": 1}, TypeError, "return_residual must be a bool; it is 1"),
        ({"query": QUERY[0, 0]}, ValueError, r"query must be .*\(6, 4\)"),
        ({"key": KEY[..., :3]}, ValueError, r"key must be .*\(2, 7, 3, 3\)"),
        ({"value": VALUE.astype(np.float16)}, ValueError, "value must have the dtype .*float16"),
        ({"query": QUERY[:, :, :5]}, ValueError, "query heads must be a multiple of key heads"),
        ({"bias": i32(T, S)}, TypeError, "bias must be floats; .*int32"),
        ({"mask": i32(T, S)}, TypeError, "mask must be bool; .*int32"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool.*1"),
        ({"query_seq_lengths": i32(3)}, ValueError, r"query_seq_lengths must be .*\(3,\)"),
        ({"key_value_seq_lengths": f32(B)}, TypeError, "key_value_seq_lengths must be integers"),
        ({"local_window_size": -1}, ValueError, "local_window_size must be >= 0; it is -1"),
    ],
)
def test_an_error_of_the_drop_in_names_the_argument(arguments, error, message):
    with refused(error, message):
        dot_product_attention(**({"query": QUERY, "key": KEY, "value": VALUE} | arguments))


TAKE_A_SCALE = {
    "flash_attention": flash_attention,
    "flash_attention_with_lse": flash_attention_with_lse,
    "flash_attention_int8": flash_attention_int8,
    "flash_attention_int8_with_lse": flash_attention_int8_with_lse,
    "dot_product_attention": dot_product_attention,
    "reference_attention": reference_attention,
}
NOT_FINITE = [
    (np.nan, "nan"),
    (np.inf, "inf"),
    (-np.inf, "-inf"),
    (jnp.float32(np.nan), "nan"),
    (np.float16(np.inf), "inf"),
    (1e39, "1e+39"),
    (-(10**400), "-inf"),
    (Fraction(10**400), "inf"),
    ([1.0, np.nan], "[ 1. nan]"),
]


@pytest.mark.parametrize("function", TAKE_A_SCALE.values(), ids=TAKE_A_SCALE)
def test_a_scale_must_be_finite_where_it_is_known(function):
    for scale, shown in NOT_FINITE:
        with refused(ValueError, f"scale must be finite in float32; it is {re.escape(shown)}"):
            function(QUERY, KEY, VALUE, scale=scale)
    with refused(TypeError, "scale must be .*; it is str"):
        function(QUERY, KEY, VALUE, scale="1")
    with refused(TypeError, "scale must be real numbers; its dtype is bool"):
        function(QUERY, KEY, VALUE, scale=True)
    with refused(ValueError, r"scale must be .*B.*; its shape is \(3,\)"):
        function(QUERY, KEY, VALUE, scale=f32(3))


@pytest.mark.parametrize("function", [flash_attention_with_lse, flash_attention_int8])
def test_a_soft_cap_must_be_finite_and_positive_where_it_is_known(function):
    for cap, shown in [*NOT_FINITE, (Fraction(-1, 2), "-0.5"), ([1, 0], "[1 0]"), (1e-60, "1e-60")]:
        must_be = "logits_soft_cap must be finite in float32 and > 0"
        with refused(ValueError, f"{must_be}; it is {re.escape(shown)}"):
            function(QUERY, KEY, VALUE, logits_soft_cap=cap)


LSE = f32(B, N, T)


@pytest.mark.parametrize(
    ("outputs", "lses", "error", "message"),
    [
        (QUERY, [LSE], TypeError, "outputs must be a list or tuple of arrays; it is ndarray"),
        ([QUERY], LSE, TypeError, "lses must be a list or tuple of arrays; it is ndarray"),
        ([], [], ValueError, "outputs and lses must be equally many, at least one; got 0, 0"),
        ([QUERY] * 2, [LSE], ValueError, "outputs and lses must be equally many.*2, 1"),
        ([None], [LSE], TypeError, r"outputs\[0\] must be an array; it is NoneType"),
        ([QUERY], [1.0], TypeError, r"lses\[0\] must be an array; it is float"),
        ([QUERY[0, 0]], [LSE], ValueError, r"outputs\[0\] must be \(B, T, N, H\) or .*\(6, 4\)"),
        ([QUERY[None]], [LSE], ValueError, r"outputs\[0\] must be .*\(1, 2, 5, 6, 4\)"),
        (
            [QUERY, QUERY[:1]],
            [LSE] * 2,
            ValueError,
            r"outputs\[1\] must be the shape of outputs\[0\] = \(2, 5, 6, 4\); .*\(1, 5, 6, 4\)",
        ),
        (
            [QUERY],
            [LSE.swapaxes(1, 2)],
            ValueError,
            r"lses\[0\] must be .*\(2, 6, 5\); .*\(2, 5, 6\)",
        ),
        ([QUERY[0]], [LSE], ValueError, r"lses\[0\] must be .*\(2, 6, 5\)"),
        ([QUERY], [LSE.astype(int)], TypeError, r"lses\[0\] must be one of float32.*int32"),
        (
            [QUERY, QUERY.astype(np.float16)],
            [LSE] * 2,
            ValueError,
            r"outputs\[1\] must have the dtype of outputs\[0\], float32; it is float16",
        ),
        (
            [QUERY] * 2,
            [LSE, LSE.astype(np.float16)],
            ValueError,
            r"lses\[1\] must have the dtype of lses\[0\], float32; it is float16",
        ),
    ],
)
def test_an_error_of_merging_names_the_part(outputs, lses, error, message):
    with refused(error, message):
        merge_attention(outputs, lses)


def test_query_heads_must_be_a_multiple_of_key_heads():
    with refused(ValueError, "query heads must be a multiple of key heads; got N=5, K=3"):
        attend(query=QUERY[:, :, :5])


def test_options_are_keywords_and_unknown_ones_are_refused():
    with pytest.raises(TypeError, match="positional"):
        flash_attention(QUERY, KEY, VALUE, None, None, 1.0)  # pyright: ignore
    with pytest.raises(TypeError, match="implementation"):
        attend(implementation="xla")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CausalMask(None), "CausalMask.offset"),
        (lambda: WindowMask(1, 1, None), "WindowMask.offset"),
        (lambda: SegmentMask(None, i32(S)), "SegmentMask.q_ids"),
        (lambda: PrefixMask(None), "PrefixMask.n"),
        (lambda: PredicateMask(3), "fn"),
    ],
)
def test_a_field_of_a_mask_that_is_missing_is_named(make, name):
    with refused(TypeError, rf"{name}.* must be .*(None|3)"):
        attend(mask=make())


@pytest.mark.parametrize(
    "fn",
    [
        lambda b, h, q_index, k_index: jnp.ones((3, 3), bool),
        lambda b, h, q_index, k_index: (q_index >= k_index)[None],
    ],
)
def test_a_predicate_must_return_what_broadcasts_with_its_indices(fn):
    with refused(ValueError, "fn of PredicateMask must return"):
        attend(mask=PredicateMask(fn))


@pytest.mark.parametrize("argument", ["batch", "head"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), ("0", TypeError)])
def test_a_look_at_a_mask_names_a_wrong_element(argument, value, error):
    element = {argument: value}
    with refused(error, f"{argument} must be .*{value}"):
        CausalMask().to_array(3, 3, **element)
    with refused(error, f"{argument} must be .*{value}"):
        block_schedule(CausalMask(), 3, 3, (2, 2), **element)


def test_a_look_at_a_mask_beyond_its_batch_is_refused():
    with refused(ValueError, r"batch must be .*2.*it is 2"):
        CausalMask(i32(2)).to_array(3, 3, batch=2)


def test_query_offset_must_be_given():
    with refused(TypeError, r"query_offset must be .*None"):
        attend(query_offset=None)


@pytest.mark.parametrize("offset", [2**31, -(2**40)])
def test_an_offset_must_fit_int32(offset):
    with refused(ValueError, rf"query_offset must .*{offset}"):
        attend(query_offset=offset, is_causal=True)


def test_a_raw_key_of_another_size_is_refused():
    with refused(TypeError, "dropout_rng must be one PRNG key"):
        attend(dropout_rate=0.5, dropout_rng=np.ones(3, np.uint32))


def test_heads_need_a_size():
    with refused(ValueError, r"query must .*\(2, 5, 6, 0\)"):
        attend(query=QUERY[..., :0], key=KEY[..., :0])


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_an_argument_of_the_drop_in_that_is_missing_is_named(name):
    with refused(TypeError, f"{name} must be an array; it is NoneType"):
        dot_product_attention(**({"query": QUERY, "key": KEY, "value": VALUE} | {name: None}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_seq_lengths": i32(B, 1)}, r"must be .*\(B,\).*is \(2, 1\)"),
        ({"query_offset": i32(B, 1)}, r"must be .*scalar.*\(B,\).*is \(2, 1\)"),
    ],
)
def test_a_message_says_what_may_have_a_batch(options, message):
    (name,) = options
    with refused(ValueError, f"{name} {message}"):
        attend(**options)
