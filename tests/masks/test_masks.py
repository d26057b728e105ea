"""Masks, and the schedule of tiles that follows from them, against their definitions in NumPy."""

import operator
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from oracle import max_error, numpy_attention, random_qkv

from flash_jax import (
    BlockSchedule,
    BlockSizes,
    BlockSparseMask,
    CausalMask,
    LengthMask,
    Mask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
    block_schedule,
    flash_attention,
)
from flash_jax._checks.bind import Sizes
from flash_jax._masks.arrays import ArrayMask
from flash_jax._masks.base import CombinedMask

B, N = 2, 3
SIZES = [(4, 9), (11, 7)]
BLOCKS = [(1, 1), (2, 3), (100, 100)]


class Case(NamedTuple):
    """A mask, and what it keeps: bool, broadcastable to (B, N, T, S)."""

    mask: Mask
    kept: np.ndarray
    tight: bool  # the schedule knows every empty and every full tile


def positions(T, S):
    return np.arange(T)[:, None], np.arange(S)[None]


def causal(T, S, offset):
    t, s = positions(T, S)
    return Case(CausalMask(offset), s <= t + per_element(offset), True)


def window(T, S, left, right, offset=0):
    t, s = positions(T, S)
    t = t + per_element(offset)
    inside = np.ones_like(s <= t)
    if left is not None:
        inside &= s >= t - left
    if right is not None:
        inside &= s <= t + right
    return Case(WindowMask(left, right, offset), inside, True)


def segments(T, S, make):
    q_ids, kv_ids = make(T), make(S)
    kept = q_ids[..., :, None] == kv_ids[..., None, :]
    return Case(SegmentMask(q_ids, kv_ids), kept[:, None] if kept.ndim == 3 else kept, False)


def lengths(T, S, q, kv):
    t, s = positions(T, S)
    kept = np.ones_like(t < s)
    kept = kept if q is None else kept & (t < per_element(q))
    kept = kept if kv is None else kept & (s < per_element(kv))
    return Case(LengthMask(q, kv), kept, True)


def prefix(T, S, n):
    t, s = positions(T, S)
    return Case(PrefixMask(n), (s < per_element(n)) & (t >= 0), True)


def checkered(b, h, q_index, k_index):
    return (2 * b + h + q_index + 3 * k_index) % 4 != 1


def predicate(T, S):
    b, h, t, s = np.ogrid[:B, :N, :T, :S]
    return Case(PredicateMask(checkered), checkered(b, h, t, s), False)


def array(T, S, shape):
    full = (B, N, T, S)
    shape = tuple(n if axis in shape else 1 for axis, n in zip("BNTS", full, strict=True))
    kept = np.random.default_rng(sum(full)).random(shape) < 0.7
    return Case(ArrayMask(kept), kept, True)


def blocks(T, S, *lead):
    table = np.random.default_rng(T).random((*lead, -(-T // 3), -(-S // 2))) < 0.5
    kept = np.repeat(np.repeat(table, 3, axis=-2)[..., :T, :], 2, axis=-1)[..., :S]
    return Case(BlockSparseMask(table, (3, 2)), kept, True)


def combined(op, a, b):
    return Case(op(a.mask, b.mask), op(a.kept, b.kept), False)


def per_element(x):
    """A scalar as it is, (B,) as (B, 1, 1, 1)."""
    return np.reshape(x, (-1, 1, 1, 1)) if np.ndim(x) else x


def sorted_ids(length):
    return np.arange(length) // 3


def shuffled_ids(length):
    return np.random.default_rng(length).integers(-1, 2, (B, length))


CASES = {
    "causal": lambda T, S: causal(T, S, 0),
    "causal, none": lambda T, S: causal(T, S, -T),
    "causal, bottom right": lambda T, S: causal(T, S, S - T),
    "causal, (B,)": lambda T, S: causal(T, S, np.array([-2, 3])),
    "window": lambda T, S: window(T, S, 2, 1),
    "window, left": lambda T, S: window(T, S, 0, None, 2),
    "window, right": lambda T, S: window(T, S, None, 0, -3),
    "window, open": lambda T, S: window(T, S, None, None),
    "window, (B,)": lambda T, S: window(T, S, 3, 1, np.array([-1, 4])),
    "segments, sorted": lambda T, S: segments(T, S, sorted_ids),
    "segments, shuffled (B, T)": lambda T, S: segments(T, S, shuffled_ids),
    "lengths, q": lambda T, S: lengths(T, S, T - 1, None),
    "lengths, kv": lambda T, S: lengths(T, S, None, S // 2),
    "lengths, (B,)": lambda T, S: lengths(T, S, np.array([T, 3]), np.array([S - 1, 2])),
    "lengths, none": lambda T, S: lengths(T, S, None, None),
    "prefix": lambda T, S: prefix(T, S, 5),
    "prefix, (B,)": lambda T, S: prefix(T, S, np.array([0, 3])),
    "predicate": predicate,
    "array (S,)": lambda T, S: array(T, S, "S"),
    "array (T, 1)": lambda T, S: array(T, S, "T"),
    "array (B, N, T, S)": lambda T, S: array(T, S, "BNTS"),
    "blocks": lambda T, S: blocks(T, S),
    "blocks (B, N)": lambda T, S: blocks(T, S, B, N),
    "prefix | causal": lambda T, S: combined(operator.or_, prefix(T, S, 3), causal(T, S, 0)),
    "window & segments": lambda T, S: combined(
        operator.and_, window(T, S, 4, 1), segments(T, S, shuffled_ids)
    ),
    "(causal | array) & lengths & predicate": lambda T, S: combined(
        operator.and_,
        combined(
            operator.and_,
            combined(operator.or_, causal(T, S, np.array([0, 2])), array(T, S, "TS")),
            lengths(T, S, None, S - 1),
        ),
        predicate(T, S),
    ),
}
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
