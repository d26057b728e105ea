"""What a cut says about a sequence, and how much of its attention is worth computing.

A low cut says that the parts have little to do with one another: few tiles between them are worth
reading. A high one says that the parts are parts of a whole. The schedules turn that into a
density, the share of tiles to keep. They and their constants are those of the system that this
library grew from, whose cuts range from 0 to 300; but the threshold, which it leaves to the user,
is where the adaptive schedule stops growing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.bind import of_kind
from .._checks.numbers import natural_number
from .mincut import MincutParts, as_affinity, over_leading_axes

UNSTRUCTURED = 300.0  # the value of a cut of an affinity without structure


class MincutSignal(NamedTuple):
    """What a cut says about sequences; ``MincutSignal.of`` measures it.

    Attributes:
        cut_value: (...) float32: 300 times the normalised cut, per part but the first. 0 says that
            nothing joins the parts, 300 that the affinity has no structure. 0 where there is one
            part.
        previous_cut_value: (...) float32, the one before: of the layer or the step before, say.
        boundary_edges: (...) int32, how many pairs of blocks of different parts have more affinity
            than the mean pair.
        boundary_concentration: (...) float32 in [0, 1]: which share of the affinity between parts
            is between blocks that lie next to a boundary.
        parts: (...) int32, how many parts there are.

    Example:
        >>> from flash_jax import mincut_parts
        >>> affinity = np.kron(np.eye(2), np.ones((3, 3))) + 0.1
        >>> signal = MincutSignal.of(affinity, mincut_parts(affinity))
        >>> print(f"{signal.cut_value:.0f}, {signal.adaptive_density():.2f} of the tiles")
        50, 0.24 of the tiles
    """

    cut_value: Array
    previous_cut_value: Array
    boundary_edges: Array
    boundary_concentration: Array
    parts: Array

    @classmethod
    def of(
        cls,
        affinity: ArrayLike,
        parts: MincutParts | ArrayLike,
        previous: MincutSignal | None = None,
        *,
        near: int = 1,
    ) -> MincutSignal:
        """Measures the parts of an affinity.

        Args:
            affinity: floats (..., n, n), >= 0; it is symmetrised.
            parts: of ``mincut_parts``, or labels (..., n), integers: blocks of one label are a
                part, whether they are neighbours or not. Its leading axes broadcast with
                affinity's.
            previous: the signal before; None: there was none, and the cut has not changed.
            near: how many blocks on either side of a boundary lie next to it.

        Raises:
            ValueError: shapes disagree; affinity has a negative or infinite entry or a NaN.
            TypeError: an argument is of the wrong kind.

        Example:
            >>> from flash_jax import mincut_parts
            >>> affinity = np.kron(np.eye(2), np.ones((3, 3))) + 0.1
            >>> signal = MincutSignal.of(affinity, mincut_parts(affinity))
            >>> round(float(signal.cut_value), 1), int(signal.boundary_edges)
            (50.0, 0)
        """
        affinity = as_affinity(affinity)
        labels = as_labels(parts, affinity)
        near = natural_number("near", near)
        before = previous.cut_value if isinstance(previous, MincutSignal) else None
        if previous is not None and before is None:
            raise TypeError(f"previous must be a MincutSignal or None; it is {previous!r}")
        cut, *others = _measured(affinity, labels, near)
        return cls(cut, cut if before is None else before, *others)

    def linear_density(
        self,
        low: float = 30.0,
        high: float = 300.0,
        least: float = 0.1,
        most: float = 0.9,
    ) -> Array:
        """The density (...): ``least`` at a cut of ``low``, ``most`` at ``high``, linear between.

        Raises:
            ValueError: low is not below high.

        Example:
            >>> ones = np.ones((6, 6))  # the affinity has no structure
            >>> f"{MincutSignal.of(ones, [0, 0, 0, 1, 1, 1]).linear_density():.2f}"
            '0.90'
        """
        if not low < high:
            raise ValueError(f"low must be below high; they are {low} and {high}")
        share = jnp.clip((self.cut_value - low) / (high - low), 0, 1)
        return least + share * (most - least)

    def threshold_density(
        self, threshold: float = 150.0, below: float = 0.1, above: float = 0.9
    ) -> Array:
        """The density (...) ``above`` where the cut is ``threshold`` or more, else ``below``.

        Example:
            >>> apart = np.eye(4)  # nothing joins the parts
            >>> f"{MincutSignal.of(apart, [0, 0, 1, 1]).threshold_density():.2f}"
            '0.10'
        """
        return jnp.where(self.cut_value >= threshold, jnp.float32(above), jnp.float32(below))

    def adaptive_density(self) -> Array:
        """The density (...), more for a high or a concentrated cut, less for many parts.

        min(cut / 150, 1) * 0.6 + 0.1 + concentration * 0.2 + max(-0.05 parts, -0.2), clamped to
        [0.1, 0.9].

        Example:
            >>> ones = np.ones((6, 6))
            >>> f"{MincutSignal.of(ones, [0, 0, 0, 1, 1, 1], near=3).adaptive_density():.2f}"
            '0.80'
        """
        return _adaptive_density(self)


@jax.jit
def _adaptive_density(signal: MincutSignal) -> Array:
    density = jnp.minimum(signal.cut_value / 150, 1) * 0.6 + 0.1
    density = density + signal.boundary_concentration * 0.2
    fewer = jnp.maximum(-0.05 * signal.parts.astype(np.float32), -0.2)
    return jnp.clip(density + fewer, 0.1, 0.9)


def as_labels(parts: Any, affinity: Array) -> Array:
    """The labels (..., n) of parts, or an error."""
    if isinstance(parts, MincutParts):
        parts = parts.labels
    labels = of_kind("parts", parts, "MincutParts, or labels, which are integers", np.integer)
    if labels.ndim == 0 or labels.shape[-1] != affinity.shape[-1]:
        raise ValueError(
            f"parts must have labels (..., n), n = {affinity.shape[-1]} as in affinity; their "
            f"shape is {labels.shape}"
        )
    try:
        np.broadcast_shapes(labels.shape[:-1], affinity.shape[:-2])
    except ValueError:
        raise ValueError(
            f"parts must broadcast with affinity but for its last axis; their labels are "
            f"{labels.shape}, and affinity is {affinity.shape}"
        ) from None
    return labels


def next_to_boundary(labels: Array, near: int) -> Array:
    """(n,) bool of labels (n,): which blocks i lie next to a boundary b, b - near <= i < b + near.

    The sequence begins with a boundary.
    """
    begins = jnp.concatenate([jnp.full_like(labels[:1], True, bool), labels[1:] != labels[:-1]])
    i = lax.iota(np.int32, labels.shape[0])
    away = i[:, None] - i[None]  # of block i from a part that begins at j
    return jnp.any((away >= -near) & (away < near) & begins[None], axis=1)


def same_part(labels: Array) -> Array:
    """(..., n, n) bool: whether two blocks are of one part."""
    return labels[..., :, None] == labels[..., None, :]


@functools.partial(jax.jit, static_argnums=2)
def _measured(affinity: Array, labels: Array, near: int) -> tuple[Array, Array, Array, Array]:
    return over_leading_axes(functools.partial(_of_one, near=near), 2, 1)(affinity, labels)


def _of_one(affinity: Array, labels: Array, *, near: int) -> tuple[Array, Array, Array, Array]:
    """Cut value, boundary edges, boundary concentration and number of parts of one sequence."""
    n = affinity.shape[0]
    w = (affinity + affinity.T) / 2
    same = same_part(labels)
    i, j = (lax.broadcasted_iota(np.int32, (n, n), axis) for axis in (0, 1))
    parts = n - jnp.sum(jnp.any(same & (j < i), axis=1), dtype=np.int32)  # blocks that are first

    across = jnp.where(same, np.float32(0), w)
    volume = jnp.sum(jnp.where(same, jnp.sum(w, axis=1, keepdims=True), 0), axis=0)
    share = jnp.sum(across, axis=1) / jnp.where(volume > 0, volume, 1)
    further = jnp.maximum(parts - 1, 1).astype(np.float32)
    cut = np.float32(UNSTRUCTURED) * jnp.sum(share) / further

    mean = jnp.sum(jnp.where(i == j, 0, w)) / max(n * (n - 1), 1)
    edges = jnp.sum((w > mean) & ~same & (j < i), dtype=np.int32)
    at = next_to_boundary(labels, near)
    there = jnp.where(at[:, None] & at[None], across, 0)
    total = jnp.sum(across)
    return cut, edges, jnp.sum(there) / jnp.where(total > 0, total, 1), parts
