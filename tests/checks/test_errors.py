"""Errors of attention name the argument, what it must be and what it is."""

import re
from fractions import Fraction

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from refusals import KEY, NK, QUERY, RNG, VALUE, B, N, S, T, attend, f32, i32, name_options, refused

from flash_jax import CausalMask, flash_attention

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
COMPLEX = jnp.ones(2, np.complex64)
BAD_STATICS = [
    ({"score_mod": 2.0}, TypeError, "a function or None", "it is 2.0"),
    (
        {"score_mod": lambda s, b, h, q, k: q},
        TypeError,
        "a float scalar",
        "it returned int32 of",
    ),
    ({"score_mod": lambda s, b, h, q, k: (s, s)}, TypeError, "a float scalar", "it returned tuple"),
    (
        {"score_mod": lambda s, *_: s + jnp.ones(2)},
        TypeError,
        "a float scalar",
        "it returned float32 of",
    ),
    (
        {"score_mod": lambda s, *_: s + abs(COMPLEX[0])},
        TypeError,
        "real numbers",
        "it captures complex64",
    ),
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


@pytest.mark.parametrize(
    ("options", "error", "must_be", "it_is"), BAD_ARRAYS + BAD_STATICS, ids=name_options
)
def test_an_error_of_attention_names_the_argument(options, error, must_be, it_is):
    name = list(options)[-1]
    message = rf"{name}\S* must .*{re.escape(must_be)}.*; {re.escape(it_is)}"
    with refused(error, message):
        attend(**options)


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


def test_query_heads_must_be_a_multiple_of_key_heads():
    with refused(ValueError, "query heads must be a multiple of key heads; got N=5, K=3"):
        attend(query=QUERY[:, :, :5])


def test_options_are_keywords_and_unknown_ones_are_refused():
    with pytest.raises(TypeError, match="positional"):
        flash_attention(QUERY, KEY, VALUE, None, None, 1.0)  # pyright: ignore
    with pytest.raises(TypeError, match="implementation"):
        attend(implementation="xla")


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
