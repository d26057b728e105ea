"""The kernels of a full tile in the backward pass: one makes p, and one makes dS.

    p = exp(s - m) / l        dP = dO V^T        dS = p * (dP - delta)

Each is used twice, by two of the three products that are left (``backward``), which is where XLA
ends a kernel. So these are the only tiles of scores that are stored, in the dtype that is
multiplied. What else a kernel has to keep to: ``kernel``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.tile import QueryTile
from .._tiles.xla import apart, dot, grown_from
from .gradients import Gradients
from .operands import Operands, kv_tile
from .plan import Plan


class Rows(NamedTuple):
    """What is known of the rows of a tile of queries."""

    q: Array  # (heads, rows, H), not scaled
    d_o: Array  # (heads, rows, Hv)
    m: Array  # (heads, rows), as l and delta
    l: Array
    delta: Array


def kernel_step(
    operands: Operands, plan: Plan, dtype: np.dtype, tile: QueryTile, rows: Rows
) -> Callable[[Array, tuple[Array, Gradients]], tuple[Array, Gradients]]:
    """What a full key tile adds to dq (heads, rows, H), not scaled yet, and to the gradients."""
    acc = rows.m.dtype
    scale = tile.of_instance(operands.scores.scale).astype(acc)
    # A scaled query in bfloat16 would have to be rounded.
    before, after = (scale, None) if dtype == acc else (None, scale)
    q, d_o = (apart(x.astype(dtype)) for x in (_times(rows.q, before), rows.d_o))
    q_t, d_o_t = (apart(jnp.swapaxes(x, 1, 2)) for x in (q, d_o))
    m = jnp.where(jnp.isneginf(rows.m), 0, rows.m)
    log_l = jnp.log(jnp.where(rows.l == 0, 1, rows.l))

    def at(j: Array, carry: tuple[Array, Gradients]) -> tuple[Array, Gradients]:
        dq, gradients = carry
        k, v = (apart(kv_tile(plan, tile, x, j, dtype)) for x in (operands.k, operands.v))
        s = _times(dot(q, k, -1, acc), after)
        x = s - grown_from(m, j)[..., None]
        # Recomputed, s may exceed its maximum by a rounding, large where s is: no more than 0.
        x -= lax.stop_gradient((x + jnp.abs(x)) * np.asarray(0.5, acc))
        p = jnp.exp(x - grown_from(log_l, j)[..., None]).astype(dtype)
        dp = dot(d_o, v, -1, acc)
        ds = (p.astype(acc) * (dp - grown_from(rows.delta, j)[..., None])).astype(dtype)
        gradients = gradients.add_keys("v", tile, j, dot(d_o_t, p, dtype=acc))
        gradients = gradients.add_keys("k", tile, j, _times(dot(q_t, ds, dtype=acc), after))
        return dq + dot(ds, k, dtype=acc), gradients

    return at


def _times(x: Array, factor: Array | None) -> Array:
    return x if factor is None else x * factor
