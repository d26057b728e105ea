"""What a cut says of a sequence, and the densities that follow."""

import jax
import numpy as np
import pytest
from refusals import refused

from flash_jax import MincutSignal, mincut_parts


def measured(affinity, labels, near):
    """The definitions, one pair of blocks at a time."""
    w, n = (affinity + affinity.T) / 2, len(labels)
    volume = {x: sum(w[i].sum() for i in range(n) if labels[i] == x) for x in labels}
    starts = [0] + [b for b in range(1, n) if labels[b] != labels[b - 1]]
    at_boundary = [any(b - near <= i < b + near for b in starts) for i in range(n)]
    mean = np.mean([w[i, j] for i in range(n) for j in range(n) if i != j])
    cut = across = concentrated = edges = 0
    for i in range(n):
        for j in range(n):
            if labels[i] != labels[j]:
                cut += w[i, j] / volume[labels[i]]
                across += w[i, j]
                concentrated += w[i, j] * (at_boundary[i] and at_boundary[j])
                edges += i < j and w[i, j] > mean
    parts = len(set(labels))
    return 300 * cut / max(parts - 1, 1), edges, concentrated / across, parts


@pytest.mark.parametrize("near", [0, 1, 2])
@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 0, 0, 2, 2, 1, 0]])
def test_a_signal_is_its_definition(labels, near, rng):
    affinity = rng.random((10, 10))
    signal = MincutSignal.of(affinity, labels, near=near)
    cut, edges, concentration, parts = measured(affinity, labels, near)
    np.testing.assert_allclose(signal.cut_value, cut, rtol=1e-5)
    np.testing.assert_allclose(signal.boundary_concentration, concentration, rtol=1e-5)
    assert (int(signal.boundary_edges), int(signal.parts)) == (edges, parts)


def test_a_cut_is_300_without_structure_and_0_where_nothing_joins_the_parts():
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert float(MincutSignal.of(np.ones((6, 6)), labels).cut_value) == pytest.approx(300)
    apart = (labels[:, None] == labels).astype(float)
    signal = MincutSignal.of(apart, labels)
    assert (float(signal.cut_value), float(signal.boundary_concentration)) == (0, 0)
    assert float(MincutSignal.of(np.ones((6, 6)), np.zeros(6, int)).cut_value) == 0  # one part


def test_a_signal_remembers_the_one_before(rng):
    first, second = (rng.random((2, 1, 8, 8)) for _ in range(2))
    before = MincutSignal.of(first, mincut_parts(first))
    np.testing.assert_array_equal(before.previous_cut_value, before.cut_value)
    after = jax.jit(lambda x, y: MincutSignal.of(x, mincut_parts(x), y))(second, before)
    np.testing.assert_array_equal(after.previous_cut_value, before.cut_value)
    assert after.cut_value.shape == (2, 1)
    alone = MincutSignal.of(second[1, 0], mincut_parts(second[1, 0]))
    np.testing.assert_allclose(after.cut_value[1, 0], alone.cut_value, rtol=1e-6)


def signal(cut, concentration=0.0, parts=2):
    arrays = (np.asarray(x, np.float32) for x in (cut, cut, 0, concentration))
    cut, previous, edges, concentration = map(jax.numpy.asarray, arrays)
    return MincutSignal(cut, previous, edges, concentration, jax.numpy.int32(parts))


def test_schedules_have_the_constants_of_the_system_they_come_from():
    cuts = signal([0, 30, 165, 300, 400])
    np.testing.assert_allclose(cuts.linear_density(), [0.1, 0.1, 0.5, 0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(cuts.linear_density(0, 400, 0.2, 1), [0.2, 0.26, 0.53, 0.8, 1])
    np.testing.assert_allclose(cuts.threshold_density(), [0.1, 0.1, 0.9, 0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(cuts.threshold_density(300, 0.2, 0.5), [0.2] * 3 + [0.5] * 2)
    for cut, concentration, parts, expected in [
        (75, 0.5, 2, 0.3 + 0.1 + 0.1 - 0.1),
        (150, 0.0, 3, 0.6 + 0.1 - 0.15),
        (300, 1.0, 2, 0.6 + 0.1 + 0.2 - 0.1),
        (300, 1.0, 40, 0.6 + 0.1 + 0.2 - 0.2),  # parts take away 0.2 at most
        (0, 0.0, 4, 0.1),  # clamped from -0.1
        (200, 1.0, 0, 0.9),
    ]:
        found = signal(cut, concentration, parts).adaptive_density()
        assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parts": np.zeros(4, int)}, ValueError, r"parts must have labels .*n = 3.*\(4,\)"),
        ({"parts": np.zeros(3)}, TypeError, "parts must be MincutParts, or labels"),
        (
            {"parts": np.zeros((2, 3), int)},
            ValueError,
            r"parts must broadcast.*\(2, 3\).*\(5, 3, 3",
        ),
        ({"previous": 3.0}, TypeError, "previous must be a MincutSignal or None; it is 3.0"),
        ({"near": -1}, ValueError, "near must be >= 0; it is -1"),
        ({"affinity": -np.ones((3, 3))}, ValueError, "affinity must have finite entries"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"affinity": np.ones((5, 3, 3)), "parts": np.zeros(3, int)} | change
    with refused(error, message):
        MincutSignal.of(**arguments)


def test_a_linear_density_needs_a_range():
    with refused(ValueError, "low must be below high; they are 300 and 30"):
        signal(1.0).linear_density(300, 30)
