"""What a cut says about a sequence, and how much of its attention is worth computing.

A low cut says that the parts have little to do with one another: few tiles between them are worth
reading. A high one says that the parts are parts of a whole. The schedules turn that into a
density, the share of tiles to keep. They and their constants are those of the system that this
library grew from, whose cuts range from 0 to 300.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.bind import of_kind
from .._checks.numbers import natural_number
from .mincut import MincutParts, as_affinity

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
        return cls(*_measured(affinity, labels, before, near))

    def linear_density(
        self,
        low: float = 30.0,
        high: float = 300.0,
        least: float = 0.1,
        most: float = 0.9,
    ) -> Array:
        """The density (...) from ``least`` where the cut is ``low`` to ``most`` where it is
        ``high``.

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
        density = jnp.minimum(self.cut_value / 150, 1) * 0.6 + 0.1
        density = density + self.boundary_concentration * 0.2
        fewer = jnp.maximum(-0.05 * self.parts.astype(np.float32), -0.2)
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
    """(..., n) bool: at most ``near`` blocks from the end of a part on either side, 0 among them.

    Block i lies at boundary b for b - near <= i < b + near. The sequence begins with a boundary.
    """
    n = labels.shape[-1]
    begins = labels[..., 1:] != labels[..., :-1]
    begins = jnp.concatenate(
        [jnp.full_like(begins, True, shape=(*labels.shape[:-1], 1)), begins], -1
    )
    i = lax.iota(np.int32, n)
    away = i[:, None] - i[None]  # of block i from a part that begins at j
    touches = (away >= -near) & (away < near)
    return jnp.any(touches & begins[..., None, :], axis=-1)


@jax.jit
def same_part(labels: Array) -> Array:
    """(..., n, n) bool: whether two blocks are of one part."""
    return labels[..., :, None] == labels[..., None, :]


def _measure(affinity: Array, labels: Array, previous: Array | None, near: int) -> tuple[Any, ...]:
    n = affinity.shape[-1]
    w = (affinity + jnp.swapaxes(affinity, -1, -2)) / 2
    same = same_part(labels)
    i, j = (lax.broadcasted_iota(np.int32, (n, n), axis) for axis in (0, 1))
    first = ~jnp.any(same & (j < i), axis=-1)  # of its part
    parts = jnp.sum(first, axis=-1, dtype=np.int32)

    across = jnp.where(same, np.float32(0), w)
    volume = jnp.sum(jnp.where(same, jnp.sum(w, axis=-1)[..., None, :], 0), axis=-1)
    share = jnp.sum(across, axis=-1) / jnp.where(volume > 0, volume, 1)
    shape = np.broadcast_shapes(w.shape[:-2], labels.shape[:-1])
    cut = jnp.broadcast_to(jnp.sum(share, axis=-1), shape)
    cut = np.float32(UNSTRUCTURED) * cut / jnp.maximum(parts - 1, 1).astype(np.float32)

    mean = jnp.sum(jnp.where(i == j, 0, w), axis=(-1, -2), keepdims=True) / max(n * (n - 1), 1)
    edges = jnp.sum((w > mean) & ~same & (j < i), axis=(-1, -2), dtype=np.int32)
    at = next_to_boundary(labels, near)
    there = jnp.where(at[..., :, None] & at[..., None, :], across, 0)
    total = jnp.sum(across, axis=(-1, -2))
    concentration = jnp.sum(there, axis=(-1, -2)) / jnp.where(total > 0, total, 1)
    before = cut if previous is None else jnp.asarray(previous, np.float32)
    return cut, before, edges, concentration, jnp.broadcast_to(parts, shape)


_measured = jax.jit(_measure, static_argnums=3)
