"""Calls of attention with a function that bends scores and captures what has derivatives."""

import jax
import numpy as np
from derivatives import floats
from jax import numpy as jnp
from options import random_inputs
from score_mods import B, N, S, T

from flash_jax import flash_attention_with_lse

SIZES = {"B": B, "T": T, "S": S, "N": N, "K": 2, "H": 5, "Hv": 3}
TILES = (8, 5)
IDS = np.arange(S, dtype=np.int32) % 3


def bent(x):
    """It captures a table and weights that move, and integers; it masks, and bends what is left."""
    table, weights, ids = map(jnp.asarray, (x["table"], x["weights"], IDS))

    def fn(score, b, h, q_index, k_index):
        slope = weights[ids[k_index]] * (1 + 0.1 * b)
        new = jnp.tanh(slope * score) * 2 + jax.nn.softplus(table[h, q_index - k_index + S])
        return jnp.where((q_index + 2 * k_index) % 5 == 0, -jnp.inf, new)

    return fn


def random_call(rng):
    names = "query", "key", "value"
    call = dict(zip(names, random_inputs(rng, **SIZES), strict=True))
    return call | {"table": floats(rng, N, T + S), "weights": floats(rng, 3)}


def attention_of(x, options, attend=flash_attention_with_lse):
    named = {name: x[name] for name in ("query", "key", "value")}
    return attend(**named, score_mod=bent(x), **options, block_sizes=TILES)


def as_float64(tree):
    wide = lambda x: x.astype(np.float64) if np.dtype(x.dtype).kind == "f" else x  # noqa: E731
    return jax.tree.map(lambda x: wide(x) if hasattr(x, "dtype") else x, tree)
