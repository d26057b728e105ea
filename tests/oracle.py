"""What correct means: attention in float64 NumPy, sharing no code with flash_jax.

Arrays are heads first: q (..., N, T, H), k (..., K, S, H), v (..., K, S, Hv).
"""

import numpy as np


def numpy_attention(q, k, v, *, scale=None, keep=None, is_causal=False):
    """Output (..., N, T, Hv) and lse (..., N, T) in float64; keep broadcasts to (..., N, T, S)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[-3] // k.shape[-3]
    k, v = np.repeat(k, groups, -3), np.repeat(v, groups, -3)
    s = np.matmul(q, np.swapaxes(k, -1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        causal = np.tri(*s.shape[-2:], dtype=bool)
        keep = causal if keep is None else keep & causal
    if keep is not None:
        s = np.where(keep, s, -np.inf)
    m = np.max(s, axis=-1, keepdims=True)
    shift = np.where(np.isneginf(m), 0, m)
    p = np.exp(s - shift)
    l = np.sum(p, axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (shift + np.log(l))[..., 0]
    return np.matmul(p, v) / np.where(l == 0, 1, l), lse


def max_error(x, exact):
    """Largest absolute difference, in float64."""
    return float(np.max(np.abs(np.asarray(x, np.float64) - exact), initial=0.0))


def random_qkv(rng, *, N, T, S, H, K=None, Hv=None, dtype=np.float32, lead=()):
    """Standard normal q, k, v, heads first."""
    K, Hv = K or N, Hv or H
    shapes = (*lead, N, T, H), (*lead, K, S, H), (*lead, K, S, Hv)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)
