"""Gradients of attention in float64 NumPy, by hand: no autodiff, nothing shared with flash_jax.

With x = scale q.k, s = soft_cap(x) - slope |t - j| + bias, p = exp(s - lse), dropout's factors w,
and cotangents dO of out = (w p) v and dlse of lse,
    dp = w (dO v^T)       delta = rowsum(p dp) - dlse      ds = p (dp - delta)
    dv = (w p)^T dO       dx = ds (1 - tanh^2(x / c))      dq = scale dx k      dk = scale dx^T q
    dscale = sum dx (q.k)       dc = sum ds (tanh(x / c) - (x / c) (1 - tanh^2(x / c)))
    dbias = ds                  dslope = -sum ds |t - j|           dsink = -sum exp(sink - lse) delta
and what serves several heads, rows or batch elements has the sum over them.
"""

from typing import NamedTuple

import numpy as np
from oracle import attention, max_error, positions, scores


class Gradient(NamedTuple):
    exact: np.ndarray
    size: float  # the largest sum of absolute terms: what roundings are relative to


def attention_gradients(
    query,
    key,
    value,
    d_out,
    d_lse,
    kept,
    *,
    bias=None,
    scale=None,
    logits_soft_cap=None,
    alibi_slopes=None,
    sinks=None,
    offset=0,
    dropout=1,
):
    """Gradients by name of sum(d_out out) + sum(d_lse lse), of every operand that is given.

    Args:
        query, key, value: (B, T, N, H), (B, S, K, H), (B, S, K, Hv), finite.
        d_out: (B, T, N, Hv).
        d_lse: (B, N, T).
        kept: bool (B, N, T, S); what a bias masks is not kept.
        offset: the query offset, an int or (B,).
        dropout: factors on the probabilities, (B, N, T, S).
    """
    q, k, v, d_o = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (query, key, value, d_out))
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    weighing = {"logits_soft_cap": logits_soft_cap, "alibi_slopes": alibi_slopes, "scale": scale}
    shape_of_bias = np.shape(bias)
    if bias is not None:
        bias = np.where(kept, np.asarray(bias, np.float64), 0)
    _, lse = attention(query, key, value, bias, kept, sinks=sinks, query_offset=offset, **weighing)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    seen = np.where(np.isneginf(lse), 0, lse)[..., None]

    products = np.einsum("bnth,bnsh->bnts", q, k)
    s = np.where(kept, scores(q, k, bias, offset, **weighing | {"scale": scale}), -np.inf)
    p = np.exp(s - seen)
    dp = np.einsum("bnth,bnsh->bnts", d_o, v) * dropout
    rows = np.where(np.isneginf(lse), 0, np.asarray(d_lse, np.float64))
    delta = np.sum(p * dp, axis=-1) - rows
    ds = p * (dp - delta[..., None])
    dx, of_cap = ds, None
    if logits_soft_cap is not None:
        x = scale * products / float(logits_soft_cap)
        slope = 1 - np.tanh(x) ** 2
        dx, of_cap = ds * slope, ds * (np.tanh(x) - x * slope)

    def heads_last(x):
        return np.swapaxes(x, 1, 2)

    def grouped(x):
        B, N, S, H = x.shape
        return heads_last(x.reshape(B, N // groups, groups, S, H).sum(axis=2))

    def contracted(spec, a, b, finish):
        size = np.max(finish(np.einsum(spec, abs(a), abs(b))), initial=0.0)
        return Gradient(finish(np.einsum(spec, a, b)), size)

    def summed(x, shape):
        return Gradient(unbroadcast(x, shape), np.max(unbroadcast(abs(x), shape), initial=0.0))

    gradients = {
        "query": contracted("bnts,bnsh->bnth", scale * dx, k, heads_last),
        "key": contracted("bnts,bnth->bnsh", scale * dx, q, grouped),
        "value": contracted("bnts,bnth->bnsh", p * dropout, d_o, grouped),
        "scale": summed(dx * products, ()),
    }
    if bias is not None:
        gradients["bias"] = summed(ds, shape_of_bias)
    if of_cap is not None:
        gradients["logits_soft_cap"] = summed(of_cap, ())
    if alibi_slopes is not None:
        t, j = positions(s.shape, offset)
        gradients["alibi_slopes"] = summed(-ds * abs(t - j), (s.shape[1], 1, 1))
    if sinks is not None:
        sinks = np.asarray(sinks, np.float64)[:, None]
        gradients["sinks"] = summed(-np.exp(sinks - lse) * delta, (s.shape[1], 1))
    return gradients


def unbroadcast(x, shape):
    """x summed over the axes along which an array of the shape was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    shared = tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1)
    return x.sum(axis=shared, keepdims=True)


def assert_gradient(name, x, plain, gradient, eps):
    """At most three times the error of differentiating the plain formula, and a few roundings."""
    exact = gradient.exact.reshape(np.shape(x))
    assert np.isfinite(np.asarray(x, np.float64)).all(), name
    error = max_error(x, exact)
    bound = 3 * max_error(plain, exact) + 4 * eps * gradient.size
    assert error <= bound, f"{name}: error {error} is above {bound}"
