import numpy as np
import pytest

from flash_jax import BlockSchedule, BlockSizes, CausalMask, block_schedule


def kept(mask, T, S):
    """The mask as an array, from its definition."""
    t, s = np.arange(T)[:, None], np.arange(S)[None]
    assert isinstance(mask, CausalMask)
    return s <= t + mask.offset


@pytest.mark.parametrize("offset", [-7, -1, 0, 1, 3, 20])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (4, 9), (9, 4), (11, 7)])
@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (3, 2), (4, 4), (100, 100)])
def test_a_tile_is_full_or_skipped_exactly_where_all_or_no_pairs_are_kept(offset, T, S, blocks):
    mask = CausalMask(offset)
    schedule = block_schedule(mask, T, S, blocks)
    array = kept(mask, T, S)
    q, kv = schedule.block_sizes
    assert (q, kv) == (min(T, blocks[0]), min(S, blocks[1]))
    assert schedule.tiles.shape == (-(-T // q), -(-S // kv))
    for (i, j), tile in np.ndenumerate(schedule.tiles):
        start = min(i * q, T - q)  # the last tile of queries starts where it still fits
        pairs = array[start : start + q, j * kv : (j + 1) * kv]
        complete = (j + 1) * kv <= S
        if not pairs.any():
            assert tile == BlockSchedule.SKIPPED
        else:
            assert tile == (
                BlockSchedule.FULL if pairs.all() and complete else BlockSchedule.PARTIAL
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
