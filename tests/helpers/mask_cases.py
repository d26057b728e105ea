"""Masks of every kind, and what each keeps by its definition in NumPy."""

import operator
from typing import NamedTuple

import numpy as np

from flash_jax import (
    BlockSparseMask,
    CausalMask,
    LengthMask,
    Mask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
)
from flash_jax._masks.arrays import ArrayMask

B, N = 2, 3


class Case(NamedTuple):
    """A mask, and what it keeps: bool, broadcastable to (B, N, T, S)."""

    mask: Mask
    kept: np.ndarray
    tight: bool  # the schedule knows every empty and every full tile


def positions(T, S):
    return np.arange(T)[:, None], np.arange(S)[None]


def causal(T, S, offset):
    t, s = positions(T, S)
    return Case(CausalMask(offset), s <= t + per_element(offset), True)


def window(T, S, left, right, offset=0):
    t, s = positions(T, S)
    t = t + per_element(offset)
    inside = np.ones_like(s <= t)
    if left is not None:
        inside &= s >= t - left
    if right is not None:
        inside &= s <= t + right
    return Case(WindowMask(left, right, offset), inside, True)


def segments(T, S, make):
    q_ids, kv_ids = make(T), make(S)
    kept = q_ids[..., :, None] == kv_ids[..., None, :]
    return Case(SegmentMask(q_ids, kv_ids), kept[:, None] if kept.ndim == 3 else kept, False)


def lengths(T, S, q, kv):
    t, s = positions(T, S)
    kept = np.ones_like(t < s)
    kept = kept if q is None else kept & (t < per_element(q))
    kept = kept if kv is None else kept & (s < per_element(kv))
    return Case(LengthMask(q, kv), kept, True)


def prefix(T, S, n):
    t, s = positions(T, S)
    return Case(PrefixMask(n), (s < per_element(n)) & (t >= 0), True)


def checkered(b, h, q_index, k_index):
    return (2 * b + h + q_index + 3 * k_index) % 4 != 1


def predicate(T, S):
    b, h, t, s = np.ogrid[:B, :N, :T, :S]
    return Case(PredicateMask(checkered), checkered(b, h, t, s), False)


def told(T, S):
    """A window by its own bounds of tiles."""
    t, s = positions(T, S)
    kept = lambda b, h, q_index, k_index: abs(q_index - k_index) <= 2  # noqa: E731

    def bounds(b, h, q, k):
        some = (k.first <= q.last + 2) & (k.last >= q.first - 2)
        return some, (k.last <= q.first + 2) & (k.first >= q.last - 2)

    return Case(PredicateMask(kept, bounds), abs(t - s) <= 2, True)


def corners(T, S):
    """It turns once along every axis, elsewhere in every batch element and head."""
    b, h, t, s = np.ogrid[:B, :N, :T, :S]
    kept = lambda b, h, q_index, k_index: k_index + b < 2 * q_index + h - 1  # noqa: E731
    return Case(PredicateMask(kept, monotone=True), kept(b, h, t, s), True)


def array(T, S, shape):
    full = (B, N, T, S)
    shape = tuple(n if axis in shape else 1 for axis, n in zip("BNTS", full, strict=True))
    kept = np.random.default_rng(sum(full)).random(shape) < 0.7
    return Case(ArrayMask(kept), kept, True)


def blocks(T, S, *lead):
    table = np.random.default_rng(T).random((*lead, -(-T // 3), -(-S // 2))) < 0.5
    kept = np.repeat(np.repeat(table, 3, axis=-2)[..., :T, :], 2, axis=-1)[..., :S]
    return Case(BlockSparseMask(table, (3, 2)), kept, True)


def combined(op, a, b):
    return Case(op(a.mask, b.mask), op(a.kept, b.kept), False)


def per_element(x):
    """A scalar as it is, (B,) as (B, 1, 1, 1)."""
    return np.reshape(x, (-1, 1, 1, 1)) if np.ndim(x) else x


def sorted_ids(length):
    return np.arange(length) // 3


def shuffled_ids(length):
    return np.random.default_rng(length).integers(-1, 2, (B, length))


CASES = {
    "causal": lambda T, S: causal(T, S, 0),
    "causal, none": lambda T, S: causal(T, S, -T),
    "causal, bottom right": lambda T, S: causal(T, S, S - T),
    "causal, (B,)": lambda T, S: causal(T, S, np.array([-2, 3])),
    "window": lambda T, S: window(T, S, 2, 1),
    "window, left": lambda T, S: window(T, S, 0, None, 2),
    "window, right": lambda T, S: window(T, S, None, 0, -3),
    "window, open": lambda T, S: window(T, S, None, None),
    "window, (B,)": lambda T, S: window(T, S, 3, 1, np.array([-1, 4])),
    "segments, sorted": lambda T, S: segments(T, S, sorted_ids),
    "segments, shuffled (B, T)": lambda T, S: segments(T, S, shuffled_ids),
    "lengths, q": lambda T, S: lengths(T, S, T - 1, None),
    "lengths, kv": lambda T, S: lengths(T, S, None, S // 2),
    "lengths, (B,)": lambda T, S: lengths(T, S, np.array([T, 3]), np.array([S - 1, 2])),
    "lengths, none": lambda T, S: lengths(T, S, None, None),
    "prefix": lambda T, S: prefix(T, S, 5),
    "prefix, (B,)": lambda T, S: prefix(T, S, np.array([0, 3])),
    "predicate": predicate,
    "predicate, bounds": told,
    "predicate, monotone": corners,
    "array (S,)": lambda T, S: array(T, S, "S"),
    "array (T, 1)": lambda T, S: array(T, S, "T"),
    "array (B, N, T, S)": lambda T, S: array(T, S, "BNTS"),
    "blocks": lambda T, S: blocks(T, S),
    "blocks (B, N)": lambda T, S: blocks(T, S, B, N),
    "prefix | causal": lambda T, S: combined(operator.or_, prefix(T, S, 3), causal(T, S, 0)),
    "window & segments": lambda T, S: combined(
        operator.and_, window(T, S, 4, 1), segments(T, S, shuffled_ids)
    ),
    "(causal | array) & lengths & predicate": lambda T, S: combined(
        operator.and_,
        combined(
            operator.and_,
            combined(operator.or_, causal(T, S, np.array([0, 2])), array(T, S, "TS")),
            lengths(T, S, None, S - 1),
        ),
        predicate(T, S),
    ),
}
