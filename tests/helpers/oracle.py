"""What correct means: attention in float64 NumPy, sharing no code with flash_jax.

Arrays are heads first: q (..., N, T, H), k (..., K, S, H), v (..., K, S, Hv).
"""

import numpy as np
from jax import numpy as jnp


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


def attention(query, key, value, bias=None, mask=None, *, dtype=None, dropout=1, **options):
    """Every option of flash_attention, in its layout (B, T, N, H): output and lse (B, N, T).

    dtype: None is exact, in float64; else the plain formula in that dtype: scores and sums are at
        least float32, probabilities and output have the dtype.
    dropout: the factors on the probabilities, (B, N, T, S), 0 or 1 / (1 - rate).
    options: the others, of `scores` and `kept_pairs`.
    """
    if np.ndim(query) == 3:
        options = {name: add_batch(x) if name in BATCHED else x for name, x in options.items()}
        arrays = (np.asarray(x)[None] for x in (query, key, value))
        out, lse = attention(*arrays, bias, mask, dtype=dtype, dropout=dropout, **options)
        return out[0], lse[0]
    sum_dtype = np.float64 if dtype is None else np.result_type(dtype, np.float32)
    sinks = options.pop("sinks", None)
    weighing = {name: options.pop(name) for name in SCORING if name in options}
    q, k, v = (np.swapaxes(np.asarray(x, sum_dtype), 1, 2) for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    kept = kept_pairs((*q.shape[:3], k.shape[2]), bias, mask, **options)
    offset = options.get("query_offset", 0)
    with np.errstate(invalid="ignore", over="ignore"):  # behind the mask anything may stand
        s = np.where(kept, scores(q, k, bias, offset, **weighing), -np.inf)
    m = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        sinks = np.asarray(sinks, sum_dtype)[:, None, None]
        m = np.maximum(m, sinks)
    shift = np.where(np.isneginf(m), 0, m)
    p = np.exp(s - shift)
    l = np.sum(p, axis=-1, keepdims=True)
    if sinks is not None:
        l = l + np.exp(sinks - shift)
    with np.errstate(divide="ignore"):
        lse = (shift + np.log(l))[..., 0]
    p = p / np.where(l == 0, 1, l) * np.asarray(dropout, sum_dtype)
    if dtype is not None:
        p = p.astype(dtype).astype(sum_dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        products = np.where(kept[..., None], p[..., None] * v[:, :, None], 0)
    out = np.swapaxes(np.sum(products, axis=-2), 1, 2)
    return out if dtype is None else out.astype(dtype), lse


SCORING = "scale", "logits_soft_cap", "alibi_slopes", "score_mod"
BATCHED = "query_seq_lengths", "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids"


def add_batch(x):
    return None if x is None else np.asarray(x)[None]


def scores(
    q, k, bias, offset, *, scale=None, logits_soft_cap=None, alibi_slopes=None, score_mod=None
):
    """score_mod(soft_cap(scale * q.k) + alibi + bias) in q's dtype, (B, N, T, S), heads first.

    score_mod: of operators alone, which NumPy has, too.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = np.matmul(q * q.dtype.type(scale), np.swapaxes(k, -1, -2))
    if logits_soft_cap is not None:
        cap = q.dtype.type(logits_soft_cap)
        s = cap * np.tanh(s / cap)
    if alibi_slopes is not None:
        t, j = positions(s.shape, offset)
        s = s - np.asarray(alibi_slopes, q.dtype)[:, None, None] * np.abs(t - j).astype(q.dtype)
    s = s if bias is None else s + np.asarray(bias, q.dtype)
    if score_mod is None:
        return s
    return score_mod(s, *np.ogrid[tuple(map(slice, s.shape))]).astype(q.dtype)


def positions(shape, offset):
    """Positions of queries (B or 1, 1, T, 1), moved by the offset, and of keys (1, 1, 1, S)."""
    offset = np.asarray(offset).reshape(-1, 1, 1, 1)
    return np.arange(shape[2])[:, None] + offset, np.arange(shape[3])[None, None, None]


def kept_pairs(
    shape,
    bias=None,
    mask=None,
    *,
    is_causal=False,
    query_offset=0,
    local_window_size=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
):
    """Which query reads which key: bool, of shape (B, N, T, S)."""
    kept = np.ones(shape, bool)
    t, s = positions(shape, query_offset)
    if bias is not None:
        kept &= ~np.isneginf(np.asarray(bias, np.float64))
    if mask is not None:
        kept &= np.asarray(mask)
    if is_causal:
        kept &= s <= t
    if local_window_size is not None:
        sides = local_window_size
        left, right = sides if isinstance(sides, tuple) else (sides, sides)
        if left is not None:
            kept &= s >= t - left
        if right is not None:
            kept &= s <= t + right
    if query_seq_lengths is not None:
        rows = np.arange(shape[2]) < np.asarray(query_seq_lengths)[:, None]
        kept &= rows[:, None, :, None]
    if key_value_seq_lengths is not None:
        columns = np.arange(shape[3]) < np.asarray(key_value_seq_lengths)[:, None]
        kept &= columns[:, None, None, :]
    if query_segment_ids is not None:
        q_ids, kv_ids = np.asarray(query_segment_ids), np.asarray(key_value_segment_ids)
        kept &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    return kept


def error_bound(plain, exact, dtype):
    """Twice the plain formula's error and one eps, of the size of the results."""
    finite = np.where(np.isfinite(exact), exact, 0)
    size = max(1.0, float(np.max(np.abs(finite), initial=0.0)))
    return 2 * finite_error(plain, exact) + float(jnp.finfo(dtype).eps) * size


def finite_error(x, exact):
    """Largest absolute difference; infinities and NaN must agree."""
    x, finite = np.asarray(x, np.float64), np.isfinite(exact)
    np.testing.assert_array_equal(x[~finite], exact[~finite])
    return max_error(x[finite], exact[finite])


def assert_within_bound(results, exact, plain, dtype):
    """Output of the dtype and float32 lse (or float64) are as accurate as the plain formula's."""
    lse_dtype = np.result_type(dtype, np.float32)
    for x, right, approximate, kind in zip(
        results, exact, plain, (np.dtype(dtype), lse_dtype), strict=True
    ):
        assert x.dtype == kind
        assert x.shape == right.shape
        error, bound = finite_error(x, right), error_bound(approximate, right, kind)
        assert error <= bound, f"error {error} is above {bound}"
