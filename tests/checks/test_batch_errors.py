"""Errors name what may have a batch axis, and which."""

import re

import numpy as np
import pytest
from refusals import B, N, S, T, attend, f32, i32, name_options, refused, unbatched

from flash_jax import CausalMask


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
