"""Masks, and the schedule of tiles that follows from them, against their definitions in NumPy."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from mask_cases import CASES, B, N, checkered
from oracle import max_error, numpy_attention, random_qkv

from flash_jax import (
    BlockSchedule,
    BlockSizes,
    CausalMask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
    block_schedule,
    flash_attention,
)
from flash_jax._checks.bind import Sizes
from flash_jax._masks.base import CombinedMask

SIZES = [(4, 9), (11, 7)]
BLOCKS = [(1, 1), (2, 3), (100, 100)]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
@pytest.mark.parametrize(("T", "S"), SIZES)
def test_to_array_is_the_definition(case, T, S):
    mask, kept, _ = case(T, S)
    kept = np.broadcast_to(kept, (B, N, T, S))
    for b, n in np.ndindex(B, N):
        np.testing.assert_array_equal(mask.to_array(T, S, batch=b, head=n), kept[b, n])


@every_case
@pytest.mark.parametrize(("T", "S"), SIZES)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_skipped_tile_keeps_no_pair_and_a_full_one_keeps_all(case, T, S, blocks):
    mask, kept, tight = case(T, S)
    kept = np.broadcast_to(kept, (B, N, T, S))
    for b, n in [(0, 0), (B - 1, N - 1)]:
        schedule = block_schedule(mask, T, S, blocks, batch=b, head=n)
        q, kv = schedule.block_sizes
        assert (q, kv) == (min(T, blocks[0]), min(S, blocks[1]))
        assert schedule.tiles.shape == (-(-T // q), -(-S // kv))
        for (i, j), tile in np.ndenumerate(schedule.tiles):
            start = min(i * q, T - q)  # the last tile of queries starts where it still fits
            pairs = kept[b, n, start : start + q, j * kv : (j + 1) * kv]
            complete = (j + 1) * kv <= S
            full = pairs.all() and complete
            if tight:
                some = BlockSchedule.FULL if full else BlockSchedule.PARTIAL
                assert tile == (some if pairs.any() else BlockSchedule.SKIPPED)
            assert tile != BlockSchedule.FULL or full
            assert tile != BlockSchedule.SKIPPED or not pairs.any()


@every_case
@pytest.mark.parametrize(("T", "S"), SIZES)
def test_keys_that_are_read_are_never_missed_and_others_known_where_it_is_simple(case, T, S):
    mask, kept, _ = case(T, S)
    real = np.any(np.broadcast_to(kept, (B, N, T, S)), axis=(1, 2))
    read = np.broadcast_to(mask.bind(Sizes(B, N, T, S)).read_keys(T, S), (B, S))
    assert not (real & ~read).any()
    unknown = isinstance(mask, PredicateMask | CombinedMask) or getattr(mask, "q", None) is not None
    if not unknown:
        np.testing.assert_array_equal(read, real)


@pytest.mark.parametrize("offset", [2**31 - 1, 2**30, -(2**30), -(2**31)])
def test_an_offset_beyond_every_sequence_does_not_overflow(offset):
    past = offset > 0  # every key lies before the queries
    for mask, kept in [
        (CausalMask(offset), past),
        (WindowMask(None, 3, offset), past),
        (WindowMask(2, 2, offset), False),
        (WindowMask(0, None, offset), not past),
    ]:
        np.testing.assert_array_equal(mask.to_array(3, 5), np.full((3, 5), kept))
        kind = BlockSchedule.FULL if kept else BlockSchedule.SKIPPED
        np.testing.assert_array_equal(block_schedule(mask, 3, 5, (1, 1)).tiles, kind)


def test_sorted_segments_skip_the_tiles_of_other_segments():
    ids = np.arange(12) // 4
    expected = BlockSchedule.FULL * np.eye(3)
    np.testing.assert_array_equal(
        block_schedule(SegmentMask(ids, ids), 12, 12, (4, 4)).tiles, expected
    )


def test_no_mask_is_full_but_for_a_ragged_end():
    assert block_schedule(None, 8, 8, (4, 4)).counts == {"full": 4, "partial": 0, "skipped": 0}
    assert block_schedule(None, 8, 7, (4, 4)).counts == {"full": 2, "partial": 2, "skipped": 0}


def test_the_schedule_prints_as_a_table():
    schedule = block_schedule(CausalMask(), 6, 6, BlockSizes(2, 2))
    assert repr(schedule).splitlines() == [
        "2 x 2 tiles: 3 full, 3 partial, 3 skipped (# full, / partial, . skipped)",
        "/ . .",
        "# / .",
        "# # /",
    ]


# With the others test_masking.py calls attention, or with what is the same there.
ATTENDED = (
    *("causal", "window, left", "window, right", "window, open", "lengths, q", "lengths, kv"),
    *("lengths, none", "prefix", "array (S,)", "array (T, 1)", "window & segments"),
    "(causal | array) & lengths & predicate",
)


@pytest.mark.parametrize("case", [CASES[name] for name in ATTENDED], ids=ATTENDED)
@pytest.mark.parametrize(("T", "S", "blocks"), [(11, 7, (4, 3))])
def test_attention_with_a_mask_is_attention_with_its_array(case, T, S, blocks, rng):
    """The mask is an argument of a jitted function, so that its arrays are traced."""
    mask, kept, _ = case(T, S)
    heads_first = random_qkv(rng, lead=(B,), N=N, K=1, T=T, S=S, H=5)
    kept = np.broadcast_to(kept, (B, N, T, S))
    exact, _ = numpy_attention(*heads_first, keep=kept)
    qkv = [np.swapaxes(x, 1, 2) for x in heads_first]
    by_mask = jax.jit(lambda mask: flash_attention(*qkv, mask=mask, block_sizes=blocks))(mask)
    by_array = flash_attention(*qkv, mask=kept, block_sizes=blocks)
    assert max_error(np.swapaxes(by_mask, 1, 2), exact) < 1e-6
    assert max_error(by_array, np.asarray(by_mask, np.float64)) < 1e-6


def test_attention_computes_no_skipped_tile(rng):
    visited = []

    def counted(b, h, q_index, k_index):
        jax.debug.callback(lambda t, s: visited.append((int(t), int(s))), *first(q_index, k_index))
        return q_index >= k_index - 100  # always, but no tile is known to be full

    def first(t, s):
        return t.ravel()[0], s.ravel()[0]

    T, S, blocks = 20, 24, (4, 8)
    mask = WindowMask(5, 0) & PredicateMask(counted)
    q, k, v = (np.swapaxes(x, 0, 1) for x in random_qkv(rng, N=1, T=T, S=S, H=3))
    jax.block_until_ready(flash_attention(q, k, v, mask=mask, block_sizes=blocks))
    jax.effects_barrier()
    tiles = block_schedule(WindowMask(5, 0), T, S, blocks).tiles
    touched = np.argwhere(tiles != BlockSchedule.SKIPPED) * blocks
    assert (tiles == BlockSchedule.SKIPPED).sum() > 5
    assert sorted(visited) == sorted(map(tuple, touched.tolist()))


def test_other_values_in_a_mask_do_not_trace_again(rng):
    q, k, v = (np.swapaxes(x, 0, 1) for x in random_qkv(rng, N=2, T=6, S=9, H=3))
    ids = np.zeros(6, np.int32), np.zeros(9, np.int32)
    masks = [(CausalMask(n) | PrefixMask(n)) & SegmentMask(*ids) for n in range(3)]
    flash_attention(q, k, v, mask=masks[0])
    with jax.no_tracing():
        results = [flash_attention(q, k, v, mask=mask) for mask in masks]
    assert max_error(results[0], np.asarray(results[2], np.float64)) > 1e-3


def test_calls_are_cached_by_the_function_of_a_predicate(rng):
    q, k, v = (np.swapaxes(x, 0, 1) for x in random_qkv(rng, N=2, T=6, S=9, H=3))
    flash_attention(q, k, v, mask=PredicateMask(checkered))
    with jax.no_tracing():
        flash_attention(q, k, v, mask=PredicateMask(checkered))


def test_a_mask_can_be_built_inside_of_a_jitted_function(rng):
    q, k, v = (np.swapaxes(x, 0, 1) for x in random_qkv(rng, N=2, T=6, S=9, H=3))

    def masked(q, k, v, n):
        return flash_attention(q, k, v, mask=PrefixMask(n) | CausalMask(n - 2))

    np.testing.assert_array_equal(jax.jit(masked)(q, k, v, 4), masked(q, k, v, jnp.int32(4)))
