"""The mask of parts and landmarks is its definition, and attention with it is exact."""

import functools

import jax
import numpy as np
import pytest
from derivatives import check, unoptimized
from options import random_inputs
from oracle import assert_within_bound, attention
from refusals import refused
from unoptimized import run

from flash_jax import (
    BlockSparseMask,
    CausalMask,
    MincutSignal,
    block_affinity,
    block_schedule,
    block_scores,
    choose_blocks,
    flash_attention_with_lse,
    mincut_mask,
    mincut_parts,
    sparse_prefill,
)

T, BLOCK = 61, 7  # 9 blocks, of which the last has 5 positions
N, K = 4, 2


def random_affinity(rng, labels, *lead):
    labels = np.asarray(labels)
    noise = rng.random((*lead, len(labels), len(labels)))
    return np.where(labels[:, None] == labels, 1.0, 0.5) * (0.5 + noise)


def defined(labels, scores, density, near, causal):
    """The tiles that are kept, in the order of the definition."""
    n, kept = len(labels), set()
    tiles = [(i, j) for i in range(n) for j in range(n) if j <= i or not causal]
    starts = [0] + [b for b in range(1, n) if labels[b] != labels[b - 1]]

    def at_boundary(i):
        return near is None or any(b - near <= i < b + near for b in starts)

    def last_first(tile):
        return -tile[0], -tile[1]

    always = [tile for tile in tiles if tile[1] in (0, tile[0])]
    inside = [tile for tile in tiles if labels[tile[0]] == labels[tile[1]]]
    inside.sort(key=lambda tile: (abs(tile[0] - tile[1]), *last_first(tile)))
    landmarks = [x for x in tiles if x not in inside and at_boundary(x[0]) and at_boundary(x[1])]
    landmarks.sort(key=lambda tile: (-scores[tile], *last_first(tile)))
    budget = max(int(density * len(tiles) + 1e-5), len(always))
    for tile in [*always, *inside, *landmarks]:
        if len(kept) < budget:
            kept.add(tile)
    table = np.zeros((n, n), bool)
    for tile in kept:
        table[tile] = True
    return table


def pairs(table, causal):
    """bool (T, T) of a table."""
    spread = table.repeat(BLOCK, -2).repeat(BLOCK, -1)[..., :T, :T]
    return spread & np.tri(T, dtype=bool) if causal else spread


LABELS = {
    "runs": [0, 0, 0, 0, 1, 1, 2, 2, 2],
    "alternating": [0, 0, 1, 1, 0, 0, 1, 1, 0],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("near", [0, 1, 2, None])
@pytest.mark.parametrize("name", LABELS)
def test_the_mask_is_its_definition_and_the_density_is_honoured(name, near, causal, rng):
    labels = np.array(LABELS[name])
    affinity, scores = random_affinity(rng, labels), rng.random((9, 9))
    tiles = 45 if causal else 81
    for density in (0.05, 0.5, 0.7, 1.0):
        table = defined(labels, scores, density, near, causal)
        options = {"density": density, "scores": scores, "near": near, "is_causal": causal}
        mask = mincut_mask(affinity, T, BLOCK, parts=labels, **options)
        np.testing.assert_array_equal(mask.to_array(T, T), pairs(table, causal))
        if near is None and density >= 0.5:
            assert table.sum() == int(density * tiles)
        # What the definition leaves out is never visited. The last tile of queries has some of the
        # one before.
        visited = block_schedule(mask, T, T, (BLOCK, BLOCK)).tiles > 0
        np.testing.assert_array_equal(visited[:-1], table[:-1])
        np.testing.assert_array_equal(visited[-1], table[-1] | table[-2])


def test_parts_scores_and_density_have_defaults(rng):
    affinity = random_affinity(rng, LABELS["runs"])
    parts = mincut_parts(affinity)
    signal = MincutSignal.of(affinity, parts)
    assert float(signal.cut_value) > 30
    density = float(signal.adaptive_density())
    w = affinity.astype(np.float32)
    table = defined(np.asarray(parts.labels), w, density, 1, causal=True)
    np.testing.assert_array_equal(mincut_mask(w, T, BLOCK).to_array(T, T), pairs(table, True))
    linear = mincut_mask(w, T, BLOCK, density=MincutSignal.linear_density)
    density = float(signal.linear_density())
    table = defined(np.asarray(parts.labels), w, density, 1, causal=True)
    np.testing.assert_array_equal(linear.to_array(T, T), pairs(table, True))


def test_it_is_dense_for_few_tokens_one_part_or_a_low_cut(rng):
    labels = np.array([0, 0, 0, 1, 1])
    low = np.where(labels[:, None] == labels, 1.0, 0.01)
    high = np.where(labels[:, None] == labels, 1.0, 0.3)
    assert float(MincutSignal.of(low, labels).cut_value) < 30
    options = {"parts": labels, "density": 0.1}

    def is_dense(affinity, T, block, **change):
        mask = mincut_mask(affinity, T, block, **(options | change))
        return bool((mask.to_array(T, T) == CausalMask().to_array(T, T)).all())

    assert is_dense(high, 15, 3)
    assert not is_dense(high, 20, 4)
    assert is_dense(high, 20, 4, parts=np.zeros(5, int))
    assert is_dense(low, 20, 4)
    assert not is_dense(low, 20, 4, min_cut=0.0)
    assert not is_dense(low, 20, 4, min_cut=3.0)
    assert is_dense(high, 20, 4, min_cut=200.0)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_gradients_are_those_of_the_pairs(causal, rng):
    q, k, v = random_inputs(rng, B=2, T=T, S=T, N=N, K=K, H=5, Hv=3)
    parts = np.array(list(LABELS.values()))[:, None]
    affinity = block_affinity(q, k, BLOCK)
    scores = block_affinity(q, k, BLOCK, kernel="softmax", per_head=True)
    options = {"density": 0.6, "scores": scores, "near": None, "is_causal": causal, "min_cut": 0.0}
    mask = mincut_mask(affinity, T, BLOCK, parts=parts, **options)
    tables = [
        [defined(parts[b, 0], np.asarray(scores)[b, h], 0.6, None, causal) for h in range(K)]
        for b in range(2)
    ]
    kept = np.repeat(pairs(np.array(tables), causal), N // K, axis=1)
    exact, plain = (attention(q, k, v, None, kept, dtype=x) for x in (None, np.float32))
    options = {"mask": mask, "block_sizes": (BLOCK, BLOCK)}
    results = run(functools.partial(flash_attention_with_lse, **options), q, k, v)
    assert_within_bound(results, exact, plain, np.float32)
    check(rng, {"query": q, "key": k, "value": v} | options, kept, run=unoptimized)


def test_the_choice_can_be_made_under_jit_and_vmap(rng):
    q, k, v = random_inputs(rng, B=3, T=T, S=T, N=N, K=K, H=5, Hv=3)

    def chosen(q, k, v, density):
        affinity = block_affinity(q, k, BLOCK)
        mask = mincut_mask(affinity, T, BLOCK, density=density, near=None, min_cut=0.0)
        return flash_attention_with_lse(q, k, v, mask=mask, block_sizes=(BLOCK, BLOCK))

    densities = np.array([0.3, 0.6, 0.9], np.float32)
    together = jax.jit(jax.vmap(chosen))(q, k, v, densities)
    alone = jax.jit(chosen)
    for i, density in enumerate(densities):
        for x, y in zip(together, alone(q[i], k[i], v[i], density), strict=True):
            np.testing.assert_allclose(x[i], y, atol=1e-6)


def test_it_is_a_method_of_sparse_prefill(rng):
    q, k, v = random_inputs(rng, B=2, T=T, S=T, N=N, K=K, H=5, Hv=3)
    options = {"method": "mincut", "density": 0.6, "block_sizes": (BLOCK, BLOCK)}
    output, table, density = sparse_prefill(q, k, v, **options)
    assert table.shape == (2, K, 9, 9)
    np.testing.assert_allclose(density, 27 / 45, rtol=1e-6)
    blocks = {"method": "pooled", "block_sizes": (BLOCK, BLOCK), "is_causal": True}
    scores = np.asarray(block_scores(q, k, **blocks))
    labels = np.asarray(mincut_parts(block_affinity(q, k, BLOCK)).labels)
    for b in range(2):
        for h in range(K):
            expected = defined(labels[b, 0], scores[b, h], 0.6, None, causal=True)
            np.testing.assert_array_equal(table[b, h], expected)
    mask = BlockSparseMask(table, (BLOCK, BLOCK))
    expected = flash_attention_with_lse(q, k, v, mask=mask, is_causal=True)[0]
    np.testing.assert_allclose(output, expected, atol=1e-6)
    options |= {"density": 0.1, "sinks": 2, "band": 3}
    wide = choose_blocks(q[0], k[0], is_causal=True, **options)
    i, j = np.mgrid[:9, :9]
    np.testing.assert_array_equal(wide[0], (i >= j) & ((j < 2) | (i - j < 3)))


def test_strict_promotion_of_ranks_and_dtypes_is_met(rng):
    affinity = random_affinity(rng, LABELS["runs"], 2, 1).astype(np.float32)
    scores = rng.random((2, K, 9, 9)).astype(np.float32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        mask = mincut_mask(affinity, T, BLOCK, scores=scores, parts=np.array(LABELS["runs"]))
        assert mask.a.table.shape == (2, K, 9, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_sizes": (3, 6)}, r"block_sizes must be equal with method='mincut'.*\(3, 6\)"),
        ({"density": None, "top_p": 0.5}, "density must be given with method='mincut', not top_p"),
        ({"key": np.ones((1, 8, 2, 4), np.float32)}, "query and key must be of one length with"),
    ],
)
def test_the_method_has_its_own_errors(change, message):
    x = np.ones((1, 9, 2, 4), np.float32)
    arguments = {"query": x, "key": x, "method": "mincut", "block_sizes": (3, 3), "density": 0.5}
    with refused(ValueError, message):
        choose_blocks(**(arguments | change))
    with refused(ValueError, "method must score blocks one by one, which 'mincut' does not"):
        block_scores(x, x, method="mincut")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"T": 60}, ValueError, r"affinity must be .* T / block_size = 20.*\(3, 1, 3, 3\)"),
        ({"T": 0}, ValueError, "T must be > 0; it is 0"),
        ({"block_size": 2.0}, TypeError, "block_size must be an integer; it is 2.0"),
        ({"density": 0.0}, ValueError, "density must be finite in float32 and > 0"),
        ({"density": 1.5}, ValueError, "density must be at most 1; it is 1.5"),
        ({"density": "half"}, TypeError, "density must be"),
        ({"scores": np.ones((2, 2))}, ValueError, r"scores must be .*3, 3.*\(2, 2\)"),
        ({"scores": -np.ones((3, 3))}, ValueError, "scores must have finite entries >= 0"),
        ({"density": np.full((2, 3), 0.5)}, ValueError, r"scores and density must .*\(2, 3\)"),
        ({"parts": np.zeros(2, int)}, ValueError, "parts must have labels"),
        ({"near": -1}, ValueError, "near must be >= 0; it is -1"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool"),
        ({"min_cut": "low"}, TypeError, "min_cut must be a real number"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"affinity": np.ones((3, 1, 3, 3)), "T": 9, "block_size": 3, "parts": [0, 0, 1]}
    with refused(error, message):
        mincut_mask(**(arguments | change))
