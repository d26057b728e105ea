"""What ``partitioned.py`` divides over a mesh, and the formula of each.

Masks and functions of scores know the whole call, wherever a device's part of it begins.
"""

import functools

import jax
import numpy as np
from formula import formula
from jax import numpy as jnp
from paths import Path, model

from flash_jax import (
    BlockSparseMask,
    Mask,
    PredicateMask,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
)
from flash_jax._masks.base import mask_type

B, T, S, N, H = 4, 24, 40, 8, 5  # which tiles of 5 and 7 do not divide, whole or in parts
TILES = (5, 7)

WINDOW = {"is_causal": True, "local_window_size": (25, 4)}
CAUSAL = {"is_causal": True, "query_offset": 9}
EVERYTHING = Path(
    model(**WINDOW, block_sizes=TILES),
    {
        "query_seq_lengths": "B",
        "key_value_seq_lengths": "B",
        "query_offset": "B",
        "query_segment_ids": "BT",
        "key_value_segment_ids": "BS",
        "mask": "B1TS",
        "bias": "1NTS",
        "sinks": "N",
        "alibi_slopes": "N",
        "scale": "",
        "logits_soft_cap": "",
    },
    floats=("query", "key", "value", "bias", "sinks", "alibi_slopes", "scale", "logits_soft_cap"),
)
PLAIN = Path(model(**CAUSAL, block_sizes=TILES))
DROPOUT = Path(model(dropout_rate=0.4, dropout_rng=jax.random.key(3), **CAUSAL))


def predicate(b, n, t, s):
    return (3 * b + 2 * n + 5 * t + s) % 4 == 1


@mask_type
class LastKeysMask(Mask):
    """Query t reads the last t + 1 keys of the call."""

    def keep(self, tile, j):
        return tile.s(j) >= tile.key_count - 1 - tile.t

    def tiles(self, tile):
        some = tile.keys.last >= tile.key_count - 1 - tile.queries.last
        return some, tile.keys.first >= tile.key_count - 1 - tile.queries.first


def scored(x, attend=flash_attention_with_lse):
    """By positions of the whole call, and by a table that every device has."""
    x = dict(x)
    table = x.pop("table")

    def mod(score, b, h, q_index, k_index):
        new = score * (1 + b / 8) + table[h % H, (q_index - k_index) % H]
        return jnp.where((q_index * 3 + k_index) % 7 == 2, -jnp.inf, new)

    return attend(**x, score_mod=mod, block_sizes=TILES)


SCORED = Path(scored, {"table": "HH"}, floats=("query", "key", "value", "table"))
INT8 = Path(
    lambda x: flash_attention_int8_with_lse(**x, probability_dtype=np.float32, block_sizes=TILES),
    {"key_value_seq_lengths": "B"},
)
TABLE = np.random.default_rng(7).random((B, N, 4, 4)) < 0.5  # blocks that parts cut through
PATHS = {
    "everything": EVERYTHING,
    "plain": PLAIN,
    "whole rows": Path(model(**CAUSAL)),  # a device's part is one tile
    "dropout": DROPOUT,
    "INT8": INT8,
    "decode": Path(model(is_causal=True), {"query_offset": "B"}, one_query=True),
    "score_mod": SCORED,
    "blocks": Path(model(mask=BlockSparseMask(TABLE, (6, 10)), **CAUSAL)),
    "predicate": Path(model(mask=PredicateMask(predicate) | LastKeysMask())),
}


def kept_by_predicate(b, n, t, s):
    return predicate(b, n, t, s) | (s >= s.size - 1 - t)


def masked(keep, **options):
    """The formula with a mask in NumPy, of indices b, n, t and s."""

    def call(x):
        shape = B, N, x["query"].shape[1], x["key"].shape[1]
        return formula(**x, mask=keep(*np.ogrid[tuple(map(slice, shape))]), **options)

    return call


FORMULAS = {
    "everything": model(formula, **WINDOW),
    "plain": model(formula, **CAUSAL),
    "whole rows": model(formula, **CAUSAL),
    "decode": model(formula, is_causal=True),
    "score_mod": functools.partial(scored, attend=formula),
    "blocks": masked(lambda b, n, t, s: TABLE[b, n, t // 6, s // 10], **CAUSAL),
    "predicate": masked(kept_by_predicate),
}
