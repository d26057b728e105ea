"""What is masked cannot leak, what is visible shows."""

import functools

import numpy as np
import pytest
from options import MASKING, TILES, B, K, N, S, T, int32, random_inputs, segments
from oracle import assert_within_bound, attention, kept_pairs

from flash_jax import (
    CausalMask,
    LengthMask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
    flash_attention_with_lse,
)


def mask_objects(rng):
    """Masks, and the pairs that they keep."""
    ids = segments(rng)
    q_ids, kv_ids = ids.values()
    t, s = np.arange(T)[:, None], np.arange(S)
    offset = int32(5, -2)
    same = (q_ids[:, :, None] == kv_ids[:, None])[:, None]
    moved = t + offset[:, None, None, None]
    n = int32(4, 9)
    lengths = LengthMask(int32(3, T), int32(S, 8))
    within = (t < lengths.q[:, None, None, None]) & (s < lengths.kv[:, None, None, None])
    return {
        "causal per element": (CausalMask(offset), s <= moved),
        "window": (WindowMask(2, 1, offset), (s >= moved - 2) & (s <= moved + 1)),
        "segments": (SegmentMask(q_ids, kv_ids), same),
        "segments of all": (SegmentMask(q_ids[0], kv_ids[0]), same[:1]),
        "lengths": (lengths, within),
        "prefix or causal": (
            PrefixMask(n) | CausalMask(),
            (s < n[:, None, None, None]) | (s <= t),
        ),
        "all of them": (
            (lengths & WindowMask(None, 3)) | (PrefixMask(n) & SegmentMask(q_ids, kv_ids)),
            (within & (s <= t + 3)) | ((s < n[:, None, None, None]) & same),
        ),
        "predicate": (
            PredicateMask(_diagonals),
            (t + s + np.arange(N)[:, None, None] + np.arange(B)[:, None, None, None]) % 3 != 0,
        ),
    }


def _diagonals(b, h, q_index, k_index):
    return (q_index + k_index + h + b) % 3 != 0


MASK_OBJECTS = list(mask_objects(np.random.default_rng(0)))


def masking_options(name, rng):
    """The options of a name in MASKING or MASK_OBJECTS, and the pairs (B, N, T, S) they keep."""
    if name in MASKING:
        options = MASKING[name](rng)
        return options, kept_pairs((B, N, T, S), **options)
    mask, pairs = mask_objects(rng)[name.removeprefix("Mask: ")]
    return {"mask": mask}, kept_pairs((B, N, T, S), mask=pairs)


ALL_MASKING = pytest.mark.parametrize("name", [*MASKING, *(f"Mask: {x}" for x in MASK_OBJECTS)])


@ALL_MASKING
def test_masks_agree_with_the_oracle_and_rows_without_keys_are_zero(name, rng):
    inputs = random_inputs(rng)
    options, kept = masking_options(name, rng)
    exact, plain = (
        attention(*inputs, options.get("bias"), kept, dtype=dtype) for dtype in (None, np.float32)
    )
    out, lse = flash_attention_with_lse(*inputs, **options, block_sizes=TILES)
    assert_within_bound((out, lse), exact, plain, np.float32)
    empty = ~kept.any(axis=-1)
    assert not np.swapaxes(out, 1, 2)[empty].any()
    np.testing.assert_array_equal(np.isneginf(lse), empty)


@pytest.mark.parametrize("name", ["mask", "bias of -inf"])
def test_rows_without_keys_are_zero_and_have_their_sink_as_lse(name, rng):
    inputs, sinks = random_inputs(rng), np.arange(N, dtype=np.float32) - 2.3
    options, kept = masking_options(name, rng)
    out, lse = flash_attention_with_lse(*inputs, **options, sinks=sinks, block_sizes=TILES)
    empty = ~kept.any(axis=-1)
    assert empty.any()
    assert not np.swapaxes(out, 1, 2)[empty].any()
    expected = np.broadcast_to(sinks[:, None], lse.shape)
    np.testing.assert_array_equal(np.asarray(lse)[empty], expected[empty])


@ALL_MASKING
def test_a_bad_key_or_value_shows_in_exactly_the_rows_that_read_it(name, rng):
    q, k, v = random_inputs(rng)
    options, kept = masking_options(name, rng)
    run = functools.partial(flash_attention_with_lse, q, **options, block_sizes=TILES)
    before = [np.asarray(x) for x in run(k, v)]
    for s in (0, 6, S - 1):
        bad = np.zeros((B, S, K), bool)
        bad[0, s, 1] = bad[1, s, 0] = True
        # (B, T, N): the row reads a bad key
        reads = (kept & np.repeat(bad, N // K, axis=2).transpose(0, 2, 1)[:, :, None]).any(-1)
        reads = reads.swapaxes(1, 2)
        for poison in (np.nan, np.inf, -np.inf, 1e30):
            worse_k, worse_v = k.copy(), v.copy()
            worse_k[bad], worse_v[bad, 1] = poison, poison
            out, lse = (np.asarray(x) for x in run(worse_k, v))
            np.testing.assert_array_equal(out[~reads], before[0][~reads])
            np.testing.assert_array_equal(
                lse.swapaxes(1, 2)[~reads], before[1].swapaxes(1, 2)[~reads]
            )
            if np.isnan(poison):
                assert np.isnan(out[reads]).all()
                assert np.isnan(lse.swapaxes(1, 2)[reads]).all()
            out, lse = (np.asarray(x) for x in run(k, worse_v))
            np.testing.assert_array_equal(out[~reads], before[0][~reads])
            np.testing.assert_array_equal(out[..., [0, 2]], before[0][..., [0, 2]])
            np.testing.assert_array_equal(lse, before[1])
            if poison != 1e30:
                np.testing.assert_array_equal(
                    out[reads][:, 1], np.full(reads.sum(), poison, np.float32)
                )


@pytest.mark.parametrize(
    "name",
    [
        "mask",
        "bias of -inf",
        "causal per element",
        "lengths",
        "segments",
        "Mask: predicate",
    ],
)
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30, -np.inf])
def test_a_bias_behind_the_mask_changes_nothing(name, poison, rng):
    inputs = random_inputs(rng)
    options, kept = masking_options(name, rng)
    bias = np.broadcast_to(options.pop("bias", rng.standard_normal((S,))), kept.shape)
    bias = bias.astype(np.float32)
    if "bias" in name:  # there -inf is the mask itself, and a mask must be before the poison
        options["mask"] = kept
    run = functools.partial(flash_attention_with_lse, *inputs, **options, block_sizes=TILES)
    before, after = run(bias=bias), run(bias=np.where(kept, bias, np.float32(poison)))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_what_is_padding_changes_nothing(poison, rng):
    q, k, v = random_inputs(rng)
    q_lengths, kv_lengths = int32(7, 3), int32(5, 16)
    options = {"query_seq_lengths": q_lengths, "key_value_seq_lengths": kv_lengths}
    run = functools.partial(flash_attention_with_lse, **options, is_causal=True, query_offset=5)
    before = run(q, k, v, block_sizes=TILES)
    q[np.arange(T) >= q_lengths[:, None]] = poison
    for x in (k, v):
        x[np.arange(S) >= kv_lengths[:, None]] = poison
    for x, y in zip(before, run(q, k, v, block_sizes=TILES), strict=True):
        np.testing.assert_array_equal(x, y)
