"""Errors of attention in 8 bits name the argument."""

import jax
import numpy as np
import pytest

from flash_jax import (
    FlashAttentionConfig,
    QuantizedArray,
    flash_attention_forward_i8,
    flash_attention_int8,
    quantize,
)

QUERY, KEY = np.ones((2, 5, 4, 8), np.float32), np.ones((2, 7, 2, 8), np.float32)
VALUE = KEY[..., :3]
BROKEN = QuantizedArray(KEY.astype(np.int8), np.ones(3, np.float32), (1, 1, 1, 8))
ERRORS = {
    "float64 query": (
        {"query": QUERY.astype(np.float64)},
        ValueError,
        "key must have the dtype of query, float64",
    ),
    "integer query": ({"query": QUERY.astype(np.int8)}, TypeError, "query must be one of"),
    "quantized query": ({"query": quantize(QUERY)}, TypeError, "query must be one of|an array"),
    "other head size": ({"key": KEY[..., :5]}, ValueError, "key must be"),
    "other length": ({"value": VALUE[:, :5]}, ValueError, "value must be"),
    "other length, quantized": ({"value": quantize(VALUE[:, :5])}, ValueError, "value must be"),
    "scales of both axes": (
        {"key": quantize(KEY, (1, 2, 1, 1))},
        ValueError,
        r"key\.scales must be constant along S or along H; their shape is \(2, 4, 2, 8\)",
    ),
    "value scales per row": (
        {"value": quantize(VALUE, (1, 1, 1, None))},
        ValueError,
        r"value\.scales must be constant along S with probability_dtype uint8",
    ),
    "broken scales": (
        {"key": BROKEN},
        ValueError,
        r"key\.scales must be one per block",
    ),
    "probability dtype": (
        {"probability_dtype": np.float16},
        ValueError,
        "probability_dtype must be one of uint8, bfloat16, float32",
    ),
    "no probability dtype": ({"probability_dtype": None}, ValueError, "probability_dtype must be"),
    "dropout": ({"dropout_rate": 0.1}, TypeError, "dropout_rate"),
    "soft cap": ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be"),
    "one segment array": (
        {"query_segment_ids": np.zeros((2, 5), np.int32)},
        ValueError,
        "key_value_segment_ids must be given",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_a_wrong_argument_is_named(changed, error, message):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE} | changed
    with jax.enable_x64(True), pytest.raises(error, match=message):
        flash_attention_int8(**arguments)


@pytest.mark.usefixtures("x64")
def test_float64_is_refused():
    with pytest.raises(TypeError, match=r"query must be float32, bfloat16 or float16"):
        flash_attention_int8(*(x.astype(np.float64) for x in (QUERY, KEY, VALUE)))


CONFIG = FlashAttentionConfig(8, 8, 5)
KERNEL_ERRORS = {
    "floats": ({"q": np.ones((3, 5), np.float32)}, TypeError, "q must be int8; its dtype is fl"),
    "a list": ({"k": [[1]]}, TypeError, "k must be an array"),
    "head size": ({"k": np.ones((4, 6), np.int8)}, ValueError, "k must be"),
    "negative scale": ({"k_scale": -1.0}, ValueError, "k_scale must be finite in float32"),
    "infinite scale": ({"v_scale": np.inf}, ValueError, "v_scale must be finite in float32"),
    "scale per row": ({"q_scale": np.ones(3)}, ValueError, "q_scale must be a scalar"),
    "no scale": ({"q_scale": None}, TypeError, "q_scale must be a real number"),
    "a bool": ({"q_scale": True}, TypeError, "q_scale must be a real number"),
    "complex": ({"q_scale": np.complex64(1)}, TypeError, "q_scale must be a real number"),
    "too large": ({"q_scale": 1e300}, ValueError, "q_scale must be finite in float32"),
    "far too large": ({"q_scale": 10**400}, ValueError, "q_scale must be finite in float32"),
    "a string": ({"q_scale": "1"}, TypeError, "q_scale must be"),
    "config": ({"config": (8, 8)}, TypeError, "config must be a FlashAttentionConfig"),
    "heads": ({"q": np.ones((2, 3, 5), np.int8)}, ValueError, "q must be"),
    "probability dtype": ({"probability_dtype": "int8"}, ValueError, "probability_dtype must be"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), KERNEL_ERRORS.values(), ids=KERNEL_ERRORS)
def test_a_wrong_kernel_argument_is_named(changed, error, message):
    arguments = {
        "config": CONFIG,
        "q": np.ones((3, 5), np.int8),
        "k": np.ones((4, 5), np.int8),
        "v": np.ones((4, 2), np.int8),
        "q_scale": 0.1,
        "k_scale": 0.1,
        "v_scale": 0.1,
    } | changed
    with pytest.raises(error, match=message):
        flash_attention_forward_i8(**arguments)
