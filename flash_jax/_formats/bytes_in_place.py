"""Few query rows times keys and values in 8 bits, which are read in place: u8 x s8 into s32.

Each key and each value has a scale of its own. The rows on the left are few, so they may be many
bytes: a query and a row of probabilities are 16-bit integers, split into two rows of bytes,

    x = a (256 high + low),    x . k = a (256 high . k + low . k)

High bytes of queries are above a zero point of 128, which a row of ones takes out again: it sums up
each key. Scales of values go onto the probabilities before these are rounded.

A query is off by at most 1 / 65534 of its largest number, and a row of probabilities, scaled, by
1 / 131070 of its largest: what is stored is what makes the error.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from jax import Array, vmap
from jax import numpy as jnp

from .._passes.operands import Operands, key_columns, kv_tile, q_tile, query_rows
from .._passes.plan import Plan
from .._passes.products import Products
from .._tiles.tile import QueryTile
from .._tiles.xla import apart, dot_u8_s8, rounded

_LEVELS = 32767  # of queries
_STEPS = 65535  # of probabilities
_ZERO_POINT = 2**15


@dataclasses.dataclass(frozen=True)
class BytesInPlace:
    """Queries in floats; keys and values in int8 with a scale per row."""

    score_bytes: ClassVar[int] = 12
    least_queries: ClassVar[int] = 2

    def products(
        self, operands: Operands, plan: Plan, tile: QueryTile, fused: bool = False
    ) -> Products:
        assert not fused
        assert operands.quantization is not None
        q_scale, _, k_scale, _, v_scale = operands.quantization
        pages = operands.pages
        whole = tile.kv.count == 1 and pages is None

        def held(x: Array, j: Array) -> Array:
            if whole:
                return tile.of_instance(x)
            return kv_tile(plan, tile, x, j, np.dtype(np.int8), pages)

        def scales(x: Array, j: Array) -> Array:
            return key_columns(tile, x, j, pages)

        q = apart(q_tile(plan, tile, operands.q, np.dtype(np.float32)))
        scale = jnp.max(jnp.abs(q), axis=-1, keepdims=True) / _LEVELS
        safe = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
        integers = jnp.round(jnp.where(jnp.isfinite(q), q, 0) / safe).astype(np.int32)
        high, low = _as_bytes(integers + _ZERO_POINT)
        ones = jnp.ones((tile.heads, 1, q.shape[-1]), np.uint8)
        # A query that is not finite makes NaN of all its scores.
        finite = jnp.all(jnp.isfinite(q), axis=-1, keepdims=True)
        scale = jnp.where(finite, scale, jnp.nan) * query_rows(tile, q_scale)[..., None]

        def scores(j: Array) -> Array:
            rows = jnp.concatenate([high, low, ones], axis=1)
            sums = vmap(dot_u8_s8)(rows, held(operands.k, j))
            n = tile.rows
            of_high = (sums[:, :n] - 128 * sums[:, 2 * n :]).astype(np.float32)
            s = of_high * 256 + sums[:, n : 2 * n].astype(np.float32)
            return rounded(s * (scale * scales(k_scale, j)[:, None]))

        def weigh(p: Array, values: tuple[Array, Array]) -> Array:
            v, v_scale = values
            p = p * v_scale[:, None]
            most = jnp.max(p, axis=-1, keepdims=True)
            # Rounded to the nearest: cut off, many small ones would be missing in the sum.
            steps = p * (_STEPS / jnp.where(most > 0, most, 1)) + 0.5
            high, low = _as_bytes(steps.astype(np.int32))
            rows = jnp.concatenate([high, low], axis=1)
            sums = vmap(lambda a, b: dot_u8_s8(a, b, axis=0))(rows, v).astype(np.float32)
            of_high, of_low = sums[:, : tile.rows], sums[:, tile.rows :]
            return (of_high * 256 + of_low) * (most / _STEPS)

        return Products(
            scores=scores,
            values=lambda j: (held(operands.v, j), scales(v_scale[..., 0], j)),
            weigh=weigh,
            finish=lambda o: o,
            floats=False,
        )


def _as_bytes(x: Array) -> tuple[Array, Array]:
    """The high and the low byte of integers in 0..65535."""
    return (x >> 8).astype(np.uint8), (x & 255).astype(np.uint8)
