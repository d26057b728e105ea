"""What goes into a case, and some rows of what must come out, in float64 NumPy.

Every worker makes the inputs for itself, from the same seed: they are equal everywhere.
"""

from __future__ import annotations

import numpy as np

from .cases import BLOCK, Case

_CHECKED_ROWS = 64


def random_inputs(case: Case, seed: int = 0) -> list[np.ndarray]:
    """Draws query, key and value from a standard normal distribution.

    With a gradient, the output's cotangent comes fourth.

    Returns:
        float32 arrays (B, T or S, N or K, H). Those of a bfloat16 case hold numbers that bfloat16
        has, so that no conversion rounds them.
    """
    rng = np.random.default_rng(seed)
    q, k = (case.T, case.N), (case.S, case.K)
    shapes = (q, k, k, q) if case.gradient else (q, k, k)
    arrays = [rng.standard_normal((case.B, *shape, case.H), dtype=np.float32) for shape in shapes]
    return [to_bfloat16(x) for x in arrays] if case.dtype == "bfloat16" else arrays


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds finite float32 to the nearest bfloat16, ties to even; the result is float32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def checked_rows(case: Case) -> np.ndarray:
    """Picks the queries whose results are compared: some, none of them padding."""
    last = min(case.filled or (case.T,)) - 1
    return np.unique(np.linspace(0, last, _CHECKED_ROWS).astype(int))


def exact_rows(case: Case, rows: np.ndarray, inputs: list[np.ndarray]) -> np.ndarray:
    """Computes some rows of the output, and with a gradient those of the query's gradient.

    Returns:
        (1 or 2, B, rows, N, H) float64.
    """
    q, k, v, *cotangent = (np.swapaxes(x.astype(np.float64), 1, 2) for x in inputs)
    k, v = (np.repeat(x, case.N // case.K, axis=1) for x in (k, v))
    scale = 1 / np.sqrt(case.H)
    s = np.where(_kept(case, rows), scale * q[:, :, rows] @ np.swapaxes(k, -1, -2), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    results = [p @ v]
    for do in cotangent:
        dp = do[:, :, rows] @ np.swapaxes(v, -1, -2)
        results.append(scale * (p * (dp - np.sum(p * dp, -1, keepdims=True))) @ k)
    return np.stack([np.swapaxes(x, 1, 2) for x in results])


def _kept(case: Case, rows: np.ndarray) -> np.ndarray:
    """Tells which pairs of some queries and all keys are kept, (1 or B, 1 or N, rows, S)."""
    if case.density is not None:
        return np.repeat(case.table[:, rows // BLOCK], BLOCK, axis=-1)[None]
    t, s = rows[:, None], np.arange(case.S)
    keep = (s <= t) if case.is_causal else np.ones((len(rows), case.S), bool)
    if case.window is not None:
        keep = keep & (s >= t - case.window)
    length = case.S // case.documents
    if case.documents > 1:
        keep = keep & (t // length == s // length)
    if case.filled is None:
        return keep[None, None]
    return keep & (s < np.array(case.filled)[:, None, None, None])
