"""Gradients of attention in float64 NumPy, by hand: no autodiff, nothing shared with flash_jax.

With x = scale q.k, s = soft_cap(x) - slope |t - j| + bias, p = exp(s - lse), dropout's factors w,
and cotangents dO of out = (w p) v and dlse of lse,
    dp = w (dO v^T)       delta = rowsum(p dp) - dlse      ds = p (dp - delta)
    dv = (w p)^T dO       dx = ds (1 - tanh^2(x / c))      dq = scale dx k    dk = scale dx^T q
    dscale = sum dx (q.k)     dc = sum ds (tanh(x / c) - (x / c) (1 - tanh^2(x / c)))
    dbias = ds                dslope = -sum ds |t - j|         dsink = -sum exp(sink - lse) delta
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
    q, k, v, d_o = (
        np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (query, key, value, d_out)
    )
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
    d_lse = np.where(np.isneginf(lse), 0, np.asarray(d_lse, np.float64))
    t, j = positions(s.shape, offset)

    def closed_form(absolute):
        """The gradients, or their sums of absolute terms."""
        a, minus = (np.abs, 1) if absolute else (lambda x: x, -1)
        dp = np.einsum("bnth,bnsh->bnts", a(d_o), a(v)) * dropout
        delta = np.sum(p * dp, axis=-1) + minus * a(d_lse)
        dx = ds = p * (dp + minus * delta[..., None])
        found = {}
        if logits_soft_cap is not None:
            x = scale * products / float(logits_soft_cap)
            slope = 1 - np.tanh(x) ** 2
            dx, dc = ds * slope, ds * (a(np.tanh(x)) + minus * a(x) * slope)
            found["logits_soft_cap"] = np.sum(dc)
        found["query"] = heads_last(np.einsum("bnts,bnsh->bnth", a(scale * dx), a(k)))
        found["key"] = grouped(np.einsum("bnts,bnth->bnsh", a(scale * dx), a(q)), groups)
        found["value"] = grouped(np.einsum("bnts,bnth->bnsh", p * dropout, a(d_o)), groups)
        found["scale"] = np.sum(dx * a(products))
        if bias is not None:
            found["bias"] = unbroadcast(ds, shape_of_bias)
        if alibi_slopes is not None:
            found["alibi_slopes"] = np.sum(minus * ds * abs(t - j), axis=(0, 2, 3))
        if sinks is not None:
            of_sink = np.exp(np.asarray(sinks, np.float64)[:, None] - lse)
            found["sinks"] = np.sum(minus * of_sink * delta, axis=(0, 2))
        return found

    sizes = closed_form(True)
    return {
        name: Gradient(x, float(np.max(sizes[name], initial=0.0)))
        for name, x in closed_form(False).items()
    }


def heads_last(x):
    return np.swapaxes(x, 1, 2)


def grouped(x, groups):
    """(B, S, K, H): x (B, N, S, H) summed over the query heads of each key head."""
    B, N, S, H = x.shape
    return heads_last(x.reshape(B, N // groups, groups, S, H).sum(axis=2))


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
