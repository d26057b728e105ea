"""Errors of scales, of merging and of the drop-in name the argument."""

import re
from fractions import Fraction

import numpy as np
import pytest
from jax import numpy as jnp
from refusals import KEY, QUERY, VALUE, B, N, S, T, f32, i32, refused

from flash_jax import (
    dot_product_attention,
    flash_attention,
    flash_attention_int8,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
    merge_attention,
    reference_attention,
)


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


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_an_argument_of_the_drop_in_that_is_missing_is_named(name):
    with refused(TypeError, f"{name} must be an array; it is NoneType"):
        dot_product_attention(**({"query": QUERY, "key": KEY, "value": VALUE} | {name: None}))
