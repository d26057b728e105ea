"""Probabilities recomputed from the statistics of the forward pass: p = exp(s - m) / l."""

from __future__ import annotations

from jax import Array, lax
from jax import numpy as jnp

from .exp import exp


def probabilities(s: Array, m: Array, l: Array) -> Array:
    """exp(s - m) / l, 0 where s is -inf and in rows that see no key.

    Args:
        s: (heads, rows, block_kv) logits.
        m: (heads, rows) their row maxima, as the forward pass found them.
        l: (heads, rows) row sums of exp(s - m).
    """
    m, l = jnp.where(jnp.isneginf(m), 0, m), jnp.where(l == 0, 1, l)
    x = s - m[..., None]
    # Recomputed in another tile, s may exceed its maximum by a rounding, large where s is.
    x -= lax.stop_gradient(jnp.where(x > 0, x, 0))
    return exp(x) * (1 / l)[..., None]
