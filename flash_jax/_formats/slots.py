"""Where the tokens of a cache lie, and how they get there.

Position p of a row lies in slot p, or in slot p modulo S of a ring. Keys and values are
(B, K, S, H), scales (B, K, S); new ones come as (B, T, K, H) and (B, T, K).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .quantized import round_to_int8, scales_of


class Appended(NamedTuple):
    """T columns of new tokens and padding."""

    offset: Array  # (B,): position of column 0
    position: Array  # (B, T)
    real: Array  # (B, T): whether it is a token
    end: Array  # (B,): the length with them

    @classmethod
    def of(cls, T: int, lengths: Array, count: Array | None, left_padded: bool) -> Appended:
        """Of ``count`` tokens, or all T, behind ``lengths`` others, both (B,)."""
        count = jnp.full_like(lengths, T) if count is None else jnp.clip(count, 0, T)
        offset, end = lengths - (T - count if left_padded else 0), lengths + count
        position = offset[:, None] + lax.iota(np.int32, T)[None]
        return cls(
            offset, position, (position >= lengths[:, None]) & (position < end[:, None]), end
        )

    def slots(self, slots: int, ring: bool) -> Array:
        """(B, T): the slot of every column, one that there is not for what is not stored."""
        stored = self.real
        if ring:  # of more tokens than slots the last ones
            stored = stored & (self.position >= self.end[:, None] - slots)
            slot = jnp.mod(self.position, np.int32(slots))
        else:
            stored, slot = stored & (self.position < slots), self.position
        nowhere = slots + lax.iota(np.int32, self.position.shape[1])
        return jnp.where(stored, slot, nowhere[None])


def written(x: Array, new: Array, slot: Array) -> Array:
    """x (B, K, S, ...) with new (B, T, K, ...) in the slots (B, T).

    A scatter, which XLA:CPU does in place, in time that does not depend on S. (0.10 converts all of
    a bfloat16 array to float32 and back.)
    """
    row = lax.iota(np.int32, x.shape[0])[:, None]
    at = x.at[row, :, slot]
    return at.set(new.astype(x.dtype), mode="drop", unique_indices=True)


def as_stored(key: Array, value: Array, dtype: np.dtype) -> dict[str, Array]:
    """What a cache of that dtype stores of new keys and values (B, T, K, H), by name.

    In int8 with scales (B, T, K). Where a key or its value is not finite, the scale of the key is
    NaN: whoever reads it gets NaN, and whoever does not is spared.
    """
    if dtype != np.int8:
        return {"keys": key, "values": value}
    (k, k_scale, k_finite), (v, v_scale, v_finite) = map(_by_row, (key, value))
    k_scale = jnp.where(k_finite & v_finite, k_scale, jnp.nan)
    return {"keys": k, "values": v, "key_scales": k_scale, "value_scales": v_scale}


def _by_row(x: Array) -> tuple[Array, Array, Array]:
    x = x.astype(np.float32)
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    scale = scales_of(jnp.where(finite, jnp.max(jnp.abs(x), axis=-1), 0))
    return round_to_int8(x, scale[..., None]), scale, finite


def as_floats_of(x: Array, scales: Array | None) -> Array:
    """What x (..., H) with scales (...) stands for: floats."""
    return x if scales is None else x.astype(np.float32) * scales[..., None]
