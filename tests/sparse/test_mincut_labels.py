"""Parts that are not contiguous are minimum cuts."""

import itertools

import jax
import numpy as np
import pytest
from refusals import refused

from flash_jax import mincut_labels
from flash_jax._sparse.graph_cut import minimum_cut


def test_texts_that_alternate_are_told_apart(rng):
    labels = np.repeat([0, 1, 0, 2, 1, 0], [3, 5, 4, 6, 2, 3])
    affinity = np.where(labels[:, None] == labels, 1.0, 0.2) * (1 + rng.random((23, 23)))
    np.testing.assert_array_equal(mincut_labels(affinity, 3), labels)
    assert mincut_labels(affinity, 3).dtype == np.int32


def test_a_minimum_cut_is_the_least_of_all_that_part_the_seeds(rng):
    for _ in range(5):
        w = rng.random((8, 8)) ** 3
        w = w + w.T
        sources, sinks = np.array([0, 3]), np.array([5])
        free = [i for i in range(8) if i not in (0, 3, 5)]

        def cut(side, w=w):
            return w[side][:, ~side].sum()

        values = []
        for chosen in itertools.product([False, True], repeat=len(free)):
            side = np.zeros(8, bool)
            side[sources], side[free] = True, chosen
            values.append(cut(side))
        found = minimum_cut(w, sources, sinks)
        assert found[sources].all()
        assert not found[sinks].any()
        assert cut(found) == pytest.approx(min(values), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 5, 6])
def test_there_are_as_many_parts_as_asked_for(parts, rng):
    for affinity in (rng.random((6, 6)), np.ones((6, 6)), np.eye(6), np.zeros((6, 6))):
        labels = mincut_labels(affinity.astype(np.float32), parts)
        assert set(labels) == set(range(parts))
        assert [int(np.argmax(labels == i)) for i in range(parts)] == sorted(
            int(np.argmax(labels == i)) for i in range(parts)
        )


@pytest.mark.parametrize(
    ("affinity", "parts", "error", "message"),
    [
        (np.eye(3), 4, ValueError, "parts must be at most n = 3.*; it is 4"),
        (np.eye(3), 0, ValueError, "parts must be > 0; it is 0"),
        (np.ones((2, 2, 2)), 2, ValueError, r"affinity must be \(n, n\).*\(2, 2, 2\)"),
        (np.eye(3, dtype=int), 2, TypeError, "affinity must be floats; its dtype is int64"),
        (-np.eye(3), 2, ValueError, "affinity must have finite.*; one is negative"),
        (np.full((3, 3), np.inf), 2, ValueError, "affinity must .*not finite"),
    ],
)
def test_errors_name_the_argument(affinity, parts, error, message):
    with refused(error, message):
        mincut_labels(affinity, parts)


def test_a_traced_affinity_is_refused_with_the_way_out():
    with refused(TypeError, "affinity must be known: .* use mincut_parts"):
        jax.jit(mincut_labels)(np.eye(3))
