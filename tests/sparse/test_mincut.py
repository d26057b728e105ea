"""Parts are those of the smallest normalised cut."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from refusals import refused

from flash_jax import mincut_parts


def symmetrised(affinity):
    x = np.asarray(affinity, np.float64)
    return (x + x.T) / 2


def normalised_cut(affinity, labels):
    """The definition: of each part, what leaves it as a share of all it has."""
    w, total = symmetrised(affinity), 0.0
    for label in np.unique(labels):
        inside = labels == label
        volume = w[inside].sum()
        total += w[inside][:, ~inside].sum() / volume if volume else 0.0
    return total


def all_labels(n, k, min_blocks=1):
    """The labels of every way to cut n blocks into k parts."""
    for cuts in itertools.combinations(range(1, n), k - 1):
        sizes = np.diff([0, *cuts, n])
        if k == 1 or sizes.min() >= min_blocks:
            yield np.repeat(np.arange(k), sizes)


def planted(sizes, between=0.05, rng=None):
    """An affinity of 1 inside parts and less between them, with noise."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    affinity = np.where(labels[:, None] == labels, 1.0, between)
    noise = 0 if rng is None else rng.random(affinity.shape)
    return affinity * (1 + noise), labels


def test_the_cut_at_every_boundary_is_the_sum_across_it(rng):
    affinity, n = rng.random((11, 11)), 11
    parts = mincut_parts(affinity, n, threshold=np.inf)
    np.testing.assert_array_equal(parts.boundaries, np.arange(1, n))
    assert parts.valid.all()
    w = symmetrised(affinity)
    np.testing.assert_allclose(parts.cuts, [w[:b, b:].sum() for b in range(1, n)], rtol=1e-5)


@pytest.mark.parametrize("min_blocks", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_no_other_parts_have_a_smaller_normalised_cut(k, min_blocks, rng):
    n = 9
    for _ in range(3):
        affinity = rng.random((n, n)) ** 4
        parts = mincut_parts(affinity, k, min_blocks=min_blocks, threshold=np.inf)
        assert int(parts.count) == k
        least = min(normalised_cut(affinity, x) for x in all_labels(n, k, min_blocks))
        assert normalised_cut(affinity, np.asarray(parts.labels)) == pytest.approx(least, abs=1e-5)
        assert np.bincount(parts.labels).min() >= min_blocks


def test_parts_that_are_there_are_found_and_no_others(rng):
    affinity, labels = planted([5, 3, 9, 4], rng=rng)
    parts = mincut_parts(affinity)
    np.testing.assert_array_equal(parts.labels, labels)
    assert int(parts.count) == 4
    np.testing.assert_array_equal(parts.boundaries, [5, 8, 17, 21, 21, 21, 21])
    np.testing.assert_array_equal(parts.valid, [True] * 3 + [False] * 4)
    w = symmetrised(affinity)
    expected = [w[:b, b:].sum() if b < 21 else 0 for b in parts.boundaries]
    np.testing.assert_allclose(parts.cuts, expected, rtol=1e-5)
    assert int(mincut_parts(np.full((7, 7), 0.3)).count) == 1  # no structure


def test_only_the_sum_of_both_directions_counts(rng):
    affinity, _ = planted([4, 2, 6], rng=rng)
    upper = np.triu(affinity, 1)
    one_way = upper + upper.T * 0 + np.diag(np.diag(affinity)) / 2
    both = mincut_parts(one_way + one_way.T)
    jax.tree.map(np.testing.assert_array_equal, mincut_parts(2 * one_way), both)


def test_a_batch_under_jit_is_one_after_another(rng):
    several = np.stack([planted(x, rng=rng)[0] for x in ([3, 4, 2], [5, 4], [9])])[:, None]
    apart = [mincut_parts(x[0]) for x in several]
    together = jax.tree.map(np.asarray, jax.jit(mincut_parts)(several))
    assert [int(x.count) for x in apart] == [3, 2, 1]
    for i, one in enumerate(apart):
        of_this = jax.tree.map(lambda x, i=i: x[i, 0], together)
        jax.tree.map(np.testing.assert_array_equal, one, of_this)
    mapped = jax.vmap(lambda x: mincut_parts(x).labels)(jnp.asarray(several))
    np.testing.assert_array_equal(mapped, together.labels)


def test_blocks_that_nothing_joins_are_parts_and_one_block_is_one_part():
    assert mincut_parts(np.eye(5)).labels.tolist() == [0, 1, 2, 3, 4]
    one = mincut_parts(np.ones((1, 1)))
    assert (one.labels.tolist(), int(one.count), one.cuts.tolist()) == ([0], 1, [0] * 7)


def test_parts_have_no_derivative(rng):
    affinity = jnp.asarray(planted([3, 4], rng=rng)[0], np.float32)
    assert not jax.grad(lambda x: mincut_parts(x).cuts.sum())(affinity).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"affinity": np.ones((3, 4))}, ValueError, r"affinity must be \(\.\.\., n, n\).*\(3, 4\)"),
        ({"affinity": np.ones((0, 0))}, ValueError, r"affinity must be .*n > 0; .*\(0, 0\)"),
        ({"affinity": np.ones((3, 3), int)}, TypeError, "affinity must be floats; it is int64"),
        ({"affinity": None}, TypeError, "affinity must be floats; it is NoneType"),
        ({"affinity": -np.eye(3)}, ValueError, "affinity must have finite.*; one is negative"),
        ({"affinity": np.eye(3) * np.nan}, ValueError, "affinity must .*; one is not finite"),
        ({"max_parts": 0}, ValueError, "max_parts must be > 0; it is 0"),
        ({"min_blocks": 1.5}, TypeError, "min_blocks must be an integer; it is 1.5"),
        ({"threshold": 0.0}, ValueError, "threshold must be > 0; it is 0.0"),
        ({"threshold": "much"}, TypeError, "threshold must be a number.*; it is 'much'"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with refused(error, message):
        mincut_parts(**({"affinity": np.eye(3)} | arguments))
