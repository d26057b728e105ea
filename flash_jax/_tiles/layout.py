"""Layouts: where in an array the axes of batch, heads, positions and head size lie.

Query head n reads key/value head n // G, so the G heads of a group lie side by side.
"""

from __future__ import annotations

import enum
from typing import Any

from jax import Array


class Layout(enum.Enum):
    """The axis of the positions; the other axes keep their order."""

    HEADS_FIRST = 2  # (B, N, T, H), as the kernels take them
    HEADS_LAST = 1  # (B, T, N, H), as models hold them

    def axes(self, batch: Any, heads: Any, positions: Any, size: Any) -> list[Any]:
        """One entry per axis, in this layout's order."""
        axes = [batch, heads, size]
        axes.insert(self.value, positions)
        return axes

    def sizes(self, x: Array) -> tuple[int, int, int, int]:
        """B, heads, positions and head size of x."""
        B, N, T, H = self.axes(0, 1, 2, 3)
        return x.shape[B], x.shape[N], x.shape[T], x.shape[H]
