"""Merged attention of parts of the keys is attention of all."""

import numpy as np
import pytest
from jax import numpy as jnp
from options import TILES, S, everything, random_inputs
from oracle import attention, error_bound, finite_error

from flash_jax import flash_attention_with_lse, merge_attention


@pytest.mark.parametrize(("cuts", "dtype"), [((5, 10), np.float32), ((6,), jnp.bfloat16)])
def test_merged_parts_of_the_keys_are_the_whole(cuts, dtype, rng):
    q, k, v = random_inputs(rng, dtype=dtype)
    options = everything(rng)
    options["mask"][:, :, 3] = False
    results = []
    for start, stop in zip((0, *cuts), (*cuts, S), strict=True):
        part = slice(start, stop)
        results.append(
            flash_attention_with_lse(
                q,
                k[:, part],
                v[:, part],
                **options
                | {
                    "bias": options["bias"][..., part],
                    "mask": options["mask"][..., part],
                    "key_value_seq_lengths": np.maximum(
                        0, options["key_value_seq_lengths"] - start
                    ),
                    "key_value_segment_ids": options["key_value_segment_ids"][:, part],
                    "query_offset": options["query_offset"] - np.int32(start),
                    "sinks": options["sinks"] if stop == S else None,
                },
                block_sizes=TILES,
            )
        )
    exact, plain = (attention(q, k, v, **options, dtype=x) for x in (None, dtype))
    assert_merged(results, exact, plain, dtype)


def test_merging_keeps_rows_that_no_part_reads(rng):
    q, k, v = random_inputs(rng)
    options = {"is_causal": True, "query_offset": -4}
    results = [
        flash_attention_with_lse(q, k[:, a:b], v[:, a:b], is_causal=True, query_offset=-4 - a)
        for a, b in ((0, 3), (3, 8), (8, S))
    ]
    exact, plain = (attention(q, k, v, **options, dtype=dtype) for dtype in (None, np.float32))
    assert np.isneginf(exact[1][..., :4]).all()
    assert_merged(results, exact, plain, np.float32)
    assert_merged(results[::-1], exact, plain, np.float32)


def assert_merged(results, exact, plain, dtype):
    """The bound of one call, and once more the eps of every part."""
    merged = merge_attention(*zip(*results, strict=True))
    for x, right, near, kind in zip(merged, exact, plain, (dtype, np.float32), strict=True):
        assert x.dtype == kind
        error, bound = finite_error(x, right), error_bound(near, right, kind)
        assert error <= bound + len(results) * float(jnp.finfo(kind).eps)
