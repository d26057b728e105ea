"""Derivatives of a call, beside those of the plain formula and the exact ones.

A call is a dict of all arguments of flash_attention_with_lse.
"""

import functools

import jax
import numpy as np
from gradient_oracle import assert_gradient, attention_gradients
from jax import lax
from jax import numpy as jnp
from options import DIFFERENTIABLE, random_inputs, split
from oracle import kept_pairs, positions
from unoptimized import UNOPTIMIZED

from flash_jax import flash_attention_with_lse

SCORING = "bias", "scale", "logits_soft_cap", "alibi_slopes", "sinks"
MASKING = (
    "mask", "is_causal", "query_offset", "local_window_size", "query_seq_lengths",
    "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids",
)  # fmt: skip


def pulled_back(differentiable, arrays, cotangents, static):
    """Gradients of flash_attention_with_lse, by name."""
    call = functools.partial(flash_attention_with_lse, **arrays, **dict(static))
    return jax.vjp(lambda x: call(**x), differentiable)[1](cotangents)[0]


optimized = jax.jit(pulled_back, static_argnums=3)
unoptimized = jax.jit(pulled_back, static_argnums=3, compiler_options=UNOPTIMIZED)


def gradients(call, cotangents, run=optimized):
    differentiable, arrays, static = split(call)
    return run(differentiable, arrays, cotangents, static)


def plain_attention(differentiable, kept, distance, dropout, score_mod=None):
    """The formula with every score at once; probabilities have the dtype of query."""
    query, key, value, bias, scale, cap, slopes, sinks = map(differentiable.get, DIFFERENTIABLE)
    sum_dtype = jnp.promote_types(query.dtype, jnp.float32)
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    s = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=sum_dtype)
    s = s * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    if slopes is not None:
        s = s - slopes[:, None, None] * distance.astype(s.dtype)
    if bias is not None:
        s = s + jnp.where(kept, bias, 0).astype(s.dtype)
    if score_mod is not None:
        s = score_mod(s, *np.ogrid[tuple(map(slice, s.shape))])
    s = jnp.where(kept, s, -jnp.inf)
    m = jnp.max(s, axis=-1, keepdims=True)
    shift = lax.stop_gradient(jnp.where(jnp.isneginf(m), 0, m))
    p = jnp.exp(s - shift)
    l = jnp.sum(p, axis=-1, keepdims=True)
    if sinks is not None:
        l = l + jnp.exp(sinks[:, None, None] - shift)
    empty, l = l == 0, jnp.where(l == 0, 1, l)
    p = (p / l * dropout).astype(query.dtype)
    out = jnp.einsum("bnts,bsnh->btnh", p, value, preferred_element_type=sum_dtype)
    return out.astype(query.dtype), jnp.where(empty, -jnp.inf, shift + jnp.log(l))[..., 0]


@functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
def plain_gradients(differentiable, pairs, cotangents):
    return jax.vjp(lambda x: plain_attention(x, *pairs), differentiable)[1](cotangents)[0]


def pairs_of(call, kept=None, dropout=1.0):
    """Of every pair of query and key: whether it is kept, its distance, and dropout's factor."""
    (B, T, N, _), S = call["query"].shape, call["key"].shape[1]
    if kept is None:
        masking = {name: call[name] for name in MASKING if name in call}
        kept = kept_pairs((B, N, T, S), call.get("bias"), **masking)
    t, s = positions((B, N, T, S), call.get("query_offset", 0))
    dtype = np.result_type(call["query"].dtype, np.float32)
    return kept, abs(t - s), np.asarray(dropout, dtype)


def random_call(rng, *sizes, **options):
    return dict(zip(("query", "key", "value"), random_inputs(rng, *sizes, **options), strict=True))


def random_cotangents(rng, call):
    """Of the output and of lse."""
    (B, T, N, _), (*_, Hv) = call["query"].shape, call["value"].shape
    dtype = call["query"].dtype
    d_out, d_lse = rng.standard_normal((B, T, N, Hv)), rng.standard_normal((B, N, T))
    return d_out.astype(dtype), d_lse.astype(np.result_type(dtype, np.float32))


def check(rng, call, kept=None, dropout=1.0, run=optimized):
    """Every gradient has its operand's dtype and at most 3 times the error of the plain one."""
    cotangents, pairs = random_cotangents(rng, call), pairs_of(call, kept, dropout)
    differentiable, _, _ = split(call)
    results = gradients(call, cotangents, run)
    plain = plain_gradients(differentiable, pairs, cotangents)
    assert_gradients(call, results, plain, cotangents, pairs)


def assert_gradients(call, results, plain, cotangents, pairs):
    kept, _, dropout = pairs
    scoring = {name: call[name] for name in SCORING if name in call}
    qkv = call["query"], call["key"], call["value"]
    offset = call.get("query_offset", 0)
    exact = attention_gradients(*qkv, *cotangents, kept, offset=offset, dropout=dropout, **scoring)
    eps = float(jnp.finfo(call["query"].dtype).eps)
    for name, x in results.items():
        assert x.dtype == call[name].dtype
        assert_gradient(name, x, plain[name], exact[name], eps)


def floats(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def weighed(function, weights):
    """The scalar sum of a function's results times weights."""
    return lambda x: sum(jnp.vdot(w, y) for w, y in zip(weights, function(x), strict=True))


def jvp(f, x, dx, weights):
    return jax.jvp(f, (x,), (dx,))[1]


def jacfwd(f, x, dx, weights):
    small = {name: x[name] for name in SCORING if name != "bias"}
    return jax.jacfwd(lambda small: f(x | small))(small)


def jacrev(f, x, dx, weights):
    """Several reverse passes at once, over operands that they share."""
    return jax.jacrev(lambda x: f(x)[0][0, -1, 1])(x)


def hessian_vector_product(f, x, dx, weights):
    return jax.jvp(jax.grad(weighed(f, weights)), (x,), (dx,))[1]
