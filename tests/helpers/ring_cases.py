"""The calls of ``ring.py``: which options, arrays and derivatives, and how the sequences lie."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from flash_jax import (
    BlockSparseMask,
    CausalMask,
    LengthMask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
)

B, N, K, H, HV = 2, 4, 2, 3, 5


class Case(NamedTuple):
    """A call whose sequences lie on some devices.

    Attributes:
        devices: of the ring; two numbers are those of two axes of the mesh.
        layout: of the positions.
        T: queries on each device.
        S: keys on each device.
        options: what is compiled in.
        arrays: of the random generator and the lengths of the whole sequences: other arrays, each
            with its axes. An axis W is one of keys that is not divided.
        floats: what has derivatives.
        kinds: what is compared; see ``derivatives``.
        call: of an attention function and the arrays.
        kept: what the call's mask keeps: of the arrays, and of indices b, h, t and s of pairs.
        dtype: of query, key and value.
        data: over how many devices the batch is divided.
        vma: whether ``shard_map`` keeps account of what varies.
    """

    devices: int | tuple[int, int]
    layout: str
    T: int
    S: int
    options: dict[str, Any] = {}  # noqa: RUF012
    arrays: Callable[..., dict[str, tuple[Any, str]]] = lambda rng, T, S: {}
    floats: tuple[str, ...] = ("query", "key", "value")
    kinds: tuple[str, ...] = ("gradient",)
    call: Callable[..., Any] = lambda attend, x: attend(**x)
    kept: Callable[..., Any] | None = None
    dtype: Any = np.float32
    data: int = 1
    vma: bool = True

    @property
    def size(self):
        return int(np.prod(self.devices))


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def lengths(rng, T, S):
    return {
        "query_seq_lengths": (np.array([T - 2, 9], np.int32), "B"),
        "key_value_seq_lengths": (np.array([7, S - 4], np.int32), "B"),
        "query_offset": (np.array([-3, 11], np.int32), "B"),
    }


def parameters(rng, T, S):
    return {
        "logits_soft_cap": (np.array([1.3, 2.1], np.float32), "B"),
        "scale": (np.float32(0.4), ""),
        "alibi_slopes": (rng.random(N).astype(np.float32), "N"),
        "sinks": (floats(rng, N), "N"),
        "query_segment_ids": (np.sort(rng.integers(0, 3, (B, T))), "BT"),
        "key_value_segment_ids": (np.sort(rng.integers(1, 4, (B, S))), "BS"),
    }


def of_pairs(rng, T, S):
    return {
        "bias": (floats(rng, N, T, S), "NTW"),
        "mask": (rng.random((B, 1, 1, S)) < 0.7, "B11S"),
    }


def of_keys(rng, T, S):
    kept = rng.random((B, 1, T, S)) < 0.7
    return {"bias": (floats(rng, S), "S"), "mask": (kept, "B1TW")}


def of_masks(rng, T, S):
    return {
        "prefix": (np.array([3, 7], np.int32), "B"),
        "kv": (np.int32(S - 2), ""),
        "q_ids": (np.sort(rng.integers(0, 2, (B, T))), "BT"),
        "kv_ids": (np.sort(rng.integers(0, 2, (B, S))), "BS"),
    }


def some_pairs(b, h, q_index, k_index):
    return (q_index * 3 + k_index * 5 + h + b) % 7 != 0


def by_masks(attend, x):
    qkv = (x[name] for name in ("query", "key", "value"))
    mask = (PrefixMask(x["prefix"]) | CausalMask()) & LengthMask(kv=x["kv"])
    mask = mask & SegmentMask(x["q_ids"], x["kv_ids"]) & PredicateMask(some_pairs)
    return attend(*qkv, mask=mask)


def kept_by_masks(x, b, h, t, s):
    kept = ((s < x["prefix"][b]) | (s <= t)) & (s < x["kv"])
    return kept & (x["q_ids"][b, t] == x["kv_ids"][b, s]) & some_pairs(b, h, t, s)


def by_scores(attend, x):
    """By positions of the whole sequences, and by a table that every device has."""
    table = x["table"]

    def mod(score, b, h, q_index, k_index):
        new = score + jnp.tanh(table[h, (q_index - k_index) % 5])
        return jnp.where((q_index + k_index) % 5 == 3, -jnp.inf, new)

    return attend(x["query"], x["key"], x["value"], score_mod=mod)


TABLE = np.random.default_rng(5).random((N, 3, 6)) < 0.6


def by_blocks(attend, x):
    """The table is of the whole sequences, and blocks of it lie on two devices."""
    qkv = (x[name] for name in ("query", "key", "value"))
    return attend(*qkv, mask=BlockSparseMask(TABLE, (5, 3)), is_causal=True)


def mapped(attend, x):
    """Under vmap and remat, with keys that are shared, in a sum over which gradients meet."""
    call = lambda q: attend(q, x["key"], x["value"], is_causal=True)  # noqa: E731
    out, lse = jax.vmap(jax.checkpoint(call))(jnp.stack([x["query"], -x["query"]]))
    return out[0] + out[1], lse[0] - lse[1]


EVERY = "primal", "tangent", "gradient", "second"
DROPOUT = {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3)}
CASES = {
    "causal": Case(4, "zigzag", 6, 6, {"is_causal": True, "block_sizes": (2, 3)}, kinds=EVERY),
    "one device": Case(1, "zigzag", 8, 6, {"is_causal": True}),
    "lengths": Case(3, "contiguous", 5, 7, {"is_causal": True}, lengths),
    "parameters": Case(
        2,
        "zigzag",
        12,
        10,
        {"local_window_size": (9, 4)},
        parameters,
        ("query", "key", "value", "logits_soft_cap", "scale", "alibi_slopes", "sinks"),
        ("tangent", "gradient"),
    ),
    "window": Case(4, "zigzag", 6, 6, {"is_causal": True, "local_window_size": (4, 0)}),
    "windows": Case(
        (2, 2), "contiguous", 5, 5, {"local_window_size": 4}, kinds=("primal", "tangent")
    ),
    "dropout": Case(4, "zigzag", 6, 4, {"is_causal": True, **DROPOUT}),
    "broadcast dropout": Case(3, "contiguous", 5, 3, {**DROPOUT, "broadcast_dropout": True}),
    "pairs": Case(2, "contiguous", 5, 7, {}, of_pairs, ("query", "key", "value", "bias")),
    "keys": Case(
        2, "zigzag", 6, 8, {"is_causal": True}, of_keys, ("key", "value", "bias"), vma=False
    ),
    "one position": Case(
        4, "contiguous", 1, 1, {"is_causal": True}, of_keys, ("query", "key", "bias")
    ),
    "masks": Case(3, "zigzag", 6, 8, {}, of_masks, call=by_masks, kept=kept_by_masks),
    "score_mod": Case(
        2,
        "zigzag",
        6,
        8,
        {},
        lambda rng, T, S: {"table": (floats(rng, N, 5), "N5")},
        ("query", "key", "value", "table"),
        ("tangent", "gradient"),
        by_scores,
    ),
    "blocks": Case(
        2,
        "zigzag",
        6,
        8,
        call=by_blocks,
        kept=lambda x, b, h, t, s: TABLE[h, t // 5, s // 3],
    ),
    "vmap": Case(2, "zigzag", 6, 6, call=mapped, data=2),
    "bfloat16": Case(
        4,
        "zigzag",
        6,
        6,
        {"is_causal": True},
        dtype=jnp.bfloat16,
        kinds=("tangent", "gradient"),
    ),
    "nothing": Case(2, "zigzag", 4, 4, {"is_causal": True, "query_offset": -9}, kinds=EVERY),
}
