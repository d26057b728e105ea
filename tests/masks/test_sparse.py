"""Masks by blocks: any table, any tiles, and visits of kept tiles only."""

import functools

import jax
import numpy as np
import pytest
from derivatives import check, random_call, unoptimized
from jax import export
from jax import numpy as jnp
from options import B, H, K, N, S, T, int32, random_inputs
from oracle import attention, kept_pairs, max_error
from unoptimized import run

from flash_jax import (
    BlockSchedule,
    BlockSparseMask,
    CausalMask,
    KVCache,
    PredicateMask,
    WindowMask,
    attend,
    block_schedule,
    flash_attention,
    flash_attention_int8,
    flash_attention_with_lse,
)
from flash_jax._checks.bind import Sizes
from flash_jax._masks.schedule import visits_of_heads
from flash_jax._tiles.axis import Axis
from flash_jax._tiles.tile import Origin, QueryTile

BLOCKS = (4, 3)


def table_of(rng, *lead, blocks=BLOCKS, T=T, S=S):
    """A third is kept, nothing in one row, and all of another."""
    table = rng.random((*lead, -(-T // blocks[0]), -(-S // blocks[1]))) < 1 / 3
    table[..., 0, :] = True
    table[..., 1, :] = False
    return table


def pairs_of(table, blocks=BLOCKS, T=T, S=S):
    """(..., T, S): the pairs that a table keeps."""
    rows = np.repeat(table, blocks[0], axis=-2)[..., :T, :]
    return np.repeat(rows, blocks[1], axis=-1)[..., :S]


def lists_of(table):
    """The same table as indices and counts, with other numbers behind those that count."""
    return np.argsort(~table, axis=-1, kind="stable"), table.sum(axis=-1)


# The leading axes of the table, its blocks, the tiles of the walk, and whether lists make it.
SHAPES = {
    "a table per query head": ((B, N), BLOCKS, None, False),
    "lists per key head, other tiles": ((1, K), BLOCKS, (3, 5), True),
    "one list, blocks of one": ((), (1, 1), (4, 4), True),
    "large blocks": ((B, 1), (6, 8), (3, 4), False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_any_table_are_exact(name, rng):
    lead, blocks, tiles, by_lists = SHAPES[name]
    table = table_of(rng, *lead, blocks=blocks)
    kept = pairs_of(table, blocks)
    if lead == (1, K):
        kept = np.repeat(kept, N // K, axis=1)
    mask = BlockSparseMask(table, blocks)
    if by_lists:
        mask = BlockSparseMask.from_indices(*lists_of(table), blocks, table.shape[-1])
        np.testing.assert_array_equal(mask.table, table)
    options = {"is_causal": True, "query_offset": int32(3, -1)} if by_lists else {}
    call = random_call(rng) | {"mask": mask, "block_sizes": tiles, **options}
    kept = kept_pairs((B, N, T, S), mask=kept, **options)
    check(rng, call, kept, run=unoptimized)


def test_gradients_beside_all_other_options_are_exact(rng):
    table, ids = table_of(rng, B, N), np.arange(S) // 6
    window = WindowMask(5, 2)
    t, s = np.arange(T)[:, None], np.arange(S)
    kept = pairs_of(table) | ((s >= t - 5) & (s <= t + 2))
    options = {
        "query_segment_ids": np.tile(ids[:T], (B, 1)),
        "key_value_segment_ids": np.tile(ids, (B, 1)),
        "bias": rng.standard_normal((1, 1, T, S)).astype(np.float32),
        "alibi_slopes": rng.standard_normal(N).astype(np.float32),
        "logits_soft_cap": np.float32(2),
        "sinks": rng.standard_normal(N).astype(np.float32),
    }
    masking = {name: x for name, x in options.items() if "ids" in name}
    kept = kept_pairs((B, N, T, S), mask=kept, **masking)
    indices, counts = lists_of(table)
    mask = BlockSparseMask.from_indices(indices, counts, BLOCKS, table.shape[-1]) | window
    call = random_call(rng) | options | {"mask": mask, "block_sizes": (4, 3)}
    check(rng, call, kept, run=unoptimized)


def test_forward_mode_float64_and_rows_without_keys(rng, x64):
    table = table_of(rng, B, K)
    qkv = random_inputs(rng, dtype=np.float64)
    tangents = random_inputs(rng, dtype=np.float64)
    mask = np.repeat(pairs_of(table), N // K, axis=1)
    exact = attention(*qkv, None, mask)
    h = 1e-6
    moved = [
        attention(*(x + sign * h * dx for x, dx in zip(qkv, tangents, strict=True)), None, mask)
        for sign in (1, -1)
    ]
    call = functools.partial(flash_attention_with_lse, mask=BlockSparseMask(table, BLOCKS))
    (out, lse), (d_out, _) = run(functools.partial(jax.jvp, call), qkv, tangents)
    empty = ~mask.any(axis=-1)
    assert empty.any()
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(empty, lse.shape))
    assert max_error(out, exact[0]) < 1e-12
    assert max_error(d_out, (moved[0][0] - moved[1][0]) / (2 * h)) < 1e-7


def test_what_is_not_kept_cannot_leak(rng):
    table = np.eye(4, dtype=bool)
    q, k, v = random_inputs(rng, 1, 16, 12, 2, 2)
    call = functools.partial(flash_attention, mask=BlockSparseMask(table, (4, 3)))
    before = np.asarray(call(q, k, v))
    for x in (k, v):
        x[:, 3:6] = np.nan
    after = np.asarray(call(q, k, v))
    np.testing.assert_array_equal(after[:, [0, 9, 15]], before[:, [0, 9, 15]])
    assert np.isnan(after[:, 4:8]).all()


@pytest.mark.parametrize("by_lists", [False, True])
@pytest.mark.parametrize(
    ("tiles", "origin"),
    [(BLOCKS, None), ((2, 1), None), ((8, 6), None), ((3, 5), None), ((3, 5), (7, 5))],
)
def test_a_head_visits_the_tiles_that_it_keeps_full_ones_first(tiles, by_lists, origin, rng):
    """On a device whose part begins at an origin, the table is still that of the whole call."""
    table = table_of(rng, 1, K)
    mask = BlockSparseMask(table, BLOCKS)
    if by_lists:
        mask = BlockSparseMask.from_indices(*lists_of(table), BLOCKS, table.shape[-1])
    bound = mask.bind(Sizes(B, K, T, S, K=K)) & CausalMask(4).bind(Sizes())
    first = origin or (0, 0)
    q, kv = Axis.of(T - first[0], tiles[0]), Axis.of(S - first[1], tiles[1])
    at = jnp.int32(0), 1, jnp.int32(0), 1, jnp.int32(0), K, 1
    tile = QueryTile(q, kv, *at, i=jnp.int32(0), wide=2)
    if origin is not None:
        tile = tile._replace(origin=Origin(None, None, *map(jnp.int32, origin), jnp.int32(S)))
    rows = jax.jit(jax.vmap(lambda i: visits_of_heads(bound, tile._replace(i=i))))
    found = jax.device_get(rows(np.arange(q.count, dtype=np.int32)))
    kept = pairs_of(table)[0] & (np.arange(S) <= np.arange(T)[:, None] + 4)
    kept = kept[:, first[0] :, first[1] :]
    for n, i in np.ndindex(K, q.count):
        t = min(i * q.block, q.length - q.block)
        here = [
            kept[n, t : t + q.block, j * kv.block : (j + 1) * kv.block] for j in range(kv.count)
        ]
        some = {j for j, x in enumerate(here) if x.any()}
        full = {j for j, x in enumerate(here) if x.all() and x.shape[1] == kv.block}
        order, count, end = found.order[i, n], found.full[i, n], found.end[i, n]
        assert {*order[:count].tolist()} == full
        assert sorted(order[:end].tolist()) == sorted(some)
        assert (order[end:] == -1).all()


def test_attention_computes_kept_tiles_only(rng):
    visited = []

    def counted(b, h, q_index, k_index):
        note = lambda t, s: visited.extend((int(t), int(x)) for x in np.unique(s // 3))  # noqa: E731
        jax.debug.callback(note, q_index.ravel()[0] // 4, k_index)
        return q_index >= k_index - 100  # always

    table = table_of(rng, blocks=BLOCKS, T=24, S=33)
    table[:, -1] = False
    q, k, v = random_inputs(rng, 1, 24, 33, 1, 1)
    mask = BlockSparseMask(table, BLOCKS) & PredicateMask(counted)
    # A visit takes all kept tiles of a row at once, filled up with the first tile.
    jax.block_until_ready(flash_attention(q, k, v, mask=mask))
    jax.effects_barrier()
    kept = {*map(tuple, np.argwhere(table).tolist())}
    assert kept <= {*visited} <= kept | {(t, 0) for t, row in enumerate(table) if row.any()}


def test_a_row_of_the_schedule_costs_what_is_listed(rng):
    """The sizes of all that a row is computed from do not depend on how many blocks there are."""

    def sizes(blocks):
        indices, counts = np.zeros((1, 1, 2, 3), int), np.ones((1, 1, 2), int)
        mask = BlockSparseMask.from_indices(indices, counts, (4, 4), blocks)
        mask = mask.bind(Sizes(T=8, S=4 * blocks)) & CausalMask(1).bind(Sizes())
        at = jnp.int32(0), 1, jnp.int32(0), 1, jnp.int32(0), 2, 1
        tile = QueryTile(Axis.of(8, 4), Axis.of(4 * blocks, 4), *at, i=jnp.int32(0), wide=2)
        row = lambda mask, i: visits_of_heads(mask, tile._replace(i=i))  # noqa: E731
        jaxpr = jax.make_jaxpr(row)(mask, jnp.int32(1)).jaxpr
        return [x.aval.size for eqn in jaxpr.eqns for x in eqn.outvars]

    assert sizes(5) == sizes(500)
    assert max(sizes(500)) <= 2 * 2 * 8


def test_under_vmap_jit_and_export_and_with_new_values(rng):
    """Tables are arrays like others: mapped, traced, exported, and replaced without a new trace."""
    qkv = random_inputs(rng, None, 12, 15, 4, 2)
    tables = np.stack([table_of(rng, 2, blocks=(5, 4), T=12, S=15) for _ in range(2)])

    @jax.jit
    def call(table):
        return flash_attention(*qkv, mask=BlockSparseMask(table, (5, 4)) & CausalMask(3))

    each = [call(tables[0])]
    with jax.no_tracing():
        each.append(call(tables[1]))
    for out, table in zip(each, tables, strict=True):
        kept = np.repeat(pairs_of(table, (5, 4), 12, 15), 2, axis=0)
        kept &= np.arange(15) <= np.arange(12)[:, None] + 3
        exact, _ = attention(*(x[None] for x in qkv), None, kept)
        assert max_error(out, exact[0]) < 1e-6
    np.testing.assert_allclose(jax.vmap(call)(tables), np.stack(each), atol=1e-6)
    mask = BlockSparseMask(tables[0], (5, 4)) & CausalMask(3)
    exported = export.export(jax.jit(lambda mask: flash_attention(*qkv, mask=mask)))(mask)
    found = export.deserialize(exported.serialize()).call(mask)
    np.testing.assert_array_equal(found, each[0])


def test_with_symbolic_lengths(rng):
    table = table_of(rng, T=70, S=50, blocks=(16, 8))
    t, s = export.symbolic_shape("t, s")
    spec = lambda *shape, dtype=np.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    call = lambda q, k, v, table: flash_attention(q, k, v, mask=BlockSparseMask(table, (16, 8)))  # noqa: E731
    keys = spec(1, s, 2, 3)
    arguments = spec(1, t, 2, 3), keys, keys, spec(-(-t // 16), -(-s // 8), dtype=bool)
    exported = export.export(jax.jit(call))(*arguments)
    qkv = random_inputs(rng, 1, 70, 50, 2, 2, 3, 3)
    exact, _ = attention(*qkv, None, pairs_of(table, (16, 8), 70, 50))
    assert max_error(exported.call(*qkv, table), exact) < 1e-6


def test_in_8_bits_and_in_a_cache(rng):
    table = table_of(rng, K)
    q, k, v = random_inputs(rng, Hv=H)
    mask = BlockSparseMask(table, BLOCKS)
    by_blocks, by_pairs = (
        flash_attention_int8(q, k, v, mask=m, probability_dtype=np.float32, block_sizes=BLOCKS)
        for m in (mask, np.repeat(pairs_of(table), N // K, axis=0))
    )
    np.testing.assert_allclose(by_blocks, by_pairs, atol=1e-6)
    cache = KVCache.empty(B, S, K, H).append(k, v)
    exact, _ = attention(q, k, v, None, np.repeat(pairs_of(table), N // K, axis=0))
    assert max_error(attend(q, cache, mask=mask, is_causal=False), exact) < 1e-6


@pytest.mark.parametrize(("T", "blocks"), [(1, (4, 32)), (3, (2, 64)), (7, (3, 200))])
def test_few_queries(T, blocks, rng):
    """Which read the keys where they lie, or all of them in one tile."""
    table = table_of(rng, B, N, blocks=blocks, T=T, S=150) if T > 1 else np.ones((B, N, 1, 5), bool)
    table[:, ::2, :, -1] = table[:, 1::2, :, 0] = False
    qkv = random_inputs(rng, B, T, 150, N, K)
    exact, _ = attention(*qkv, None, pairs_of(table, blocks, T, 150))
    assert max_error(flash_attention(*qkv, mask=BlockSparseMask(table, blocks)), exact) < 1e-6


def test_kernels_of_large_tiles(rng):
    """Where a tile is one kernel, full ones and those that must be masked."""
    T = S = 1000
    q, k, v = random_inputs(rng, 1, T, S, 4, 2, 16, 16)
    table = table_of(rng, 1, 2, blocks=(128, 64), T=T, S=S)
    kept = np.repeat(pairs_of(table, (128, 64), T, S), 2, axis=1)
    exact, _ = attention(q, k, v, None, kept, is_causal=True)
    mask = BlockSparseMask(table, (128, 64))
    assert max_error(flash_attention(q, k, v, mask=mask, is_causal=True), exact) < 2e-6


def test_memory_of_gradients_is_linear(compiled_here):
    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), np.float32)
        table = jax.ShapeDtypeStruct((2, T // 128, T // 128), bool)

        def loss(q, k, v, table):
            mask = BlockSparseMask(table, (128, 128))
            return jnp.sum(flash_attention(q, k, v, mask=mask))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(32768) <= 2.1 * temporaries(16384)


def test_the_schedule_can_be_looked_at():
    table = np.array([[[True, False]], [[True, True]]])
    schedule = block_schedule(BlockSparseMask(table, (4, 4)), 4, 8, (2, 4), head=1)
    np.testing.assert_array_equal(schedule.tiles, BlockSchedule.FULL)
    with pytest.raises(ValueError, match="head must be below the mask's heads, 2; it is 2"):
        block_schedule(BlockSparseMask(table, (4, 4)), 4, 8, (2, 4), head=2)
