"""The order in which a causal sequence is shared out evenly, and which devices' keys are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.numbers import positive_integer


def to_zigzag(x: ArrayLike, devices: int, *, axis: int = 1) -> Array:
    """Brings an axis of positions into zigzag order, for ``ring_attention``.

    The positions are cut into 2n blocks for n devices. Device i then holds blocks i and 2n - 1 - i,
    so that under a causal mask every device has equal work. What goes by position is brought into
    that order, too: the positions themselves, which rotary embeddings take, labels, segment ids.

    Args:
        x: an array with an axis of positions, whose length 2n divides.
        devices: n, the size of the mesh axis.
        axis: of the positions.

    Returns:
        x with that axis in the order of the devices.

    Raises:
        ValueError: x has no such axis, or 2n does not divide it.
        TypeError: devices or axis is no integer.

    Example:
        >>> import jax.numpy as jnp
        >>> to_zigzag(jnp.arange(8), 2, axis=0).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return _in_blocks(x, devices, axis, _order)


def from_zigzag(x: ArrayLike, devices: int, *, axis: int = 1) -> Array:
    """Brings an axis from zigzag order back into that of the positions: undoes ``to_zigzag``.

    Args, Returns and Raises: as ``to_zigzag``.

    Example:
        >>> import jax.numpy as jnp
        >>> from_zigzag(to_zigzag(jnp.arange(8), 2, axis=0), 2, axis=0).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return _in_blocks(x, devices, axis, lambda n: np.argsort(_order(n)))


def _order(devices: int) -> np.ndarray:
    return np.array([block for i in range(devices) for block in (i, 2 * devices - 1 - i)])


def _in_blocks(x: ArrayLike, devices: int, axis: int, order: Any) -> Array:
    x, devices = jnp.asarray(x), positive_integer("devices", devices)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis must be an integer; it is {axis!r}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of x, whose shape is {x.shape}; it is {axis}")
    axis %= x.ndim
    if x.shape[axis] % (2 * devices):
        raise ValueError(
            f"x must have an axis {axis} that 2 * devices = {2 * devices} divides; its shape is "
            f"{x.shape}"
        )
    blocks = x.reshape(*x.shape[:axis], 2 * devices, -1, *x.shape[axis + 1 :])
    taken = jnp.take(blocks, order(devices), axis=axis, unique_indices=True, mode="clip")
    return taken.reshape(x.shape)


def needed_rounds(
    devices: int,
    parts: int,
    T: int,
    S: int,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    offset: int | None,
) -> tuple[int, ...]:
    """The rounds of a ring in which the mask keeps some pair on some device.

    Args:
        devices: n; in round r device i has the keys of device i - r.
        parts: 1, or 2 in zigzag order.
        T: queries per device.
        S: keys per device.
        is_causal: as in attention.
        window: (left, right), as in attention.
        offset: of the queries; None: not known before the program runs.
    """
    every = tuple(range(devices))
    left, right = window or (None, None)
    right = 0 if is_causal else right
    if offset is None or (left is None and right is None) or 0 in (T, S):
        return every
    order = np.arange(devices) if parts == 1 else _order(devices)
    order = order.reshape(devices, parts).astype(np.int64)
    first_q, first_k = (order * (length // parts) for length in (T, S))
    first_q = first_q + offset
    last_q, last_k = first_q + T // parts - 1, first_k + S // parts - 1

    def needed(r: int) -> bool:
        first, last = (np.roll(x, r, axis=0)[:, None, :] for x in (first_k, last_k))
        met = np.full((devices, parts, parts), True)
        if left is not None:
            met &= last >= first_q[:, :, None] - left
        if right is not None:
            met &= first <= last_q[:, :, None] + right
        return bool(met.any())

    return tuple(r for r in every if needed(r))
