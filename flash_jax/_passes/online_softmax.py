"""Online softmax: softmax(s) @ v from one pass over blocks of keys.

For a query with logits s_j and values v_j seen so far, the state is
    m = max_j s_j,   l = sum_j exp(s_j - m),   o = sum_j exp(s_j - m) v_j,
so softmax(s) @ v = o / l and logsumexp(s) = m + log(l). States over disjoint sets of keys form a
commutative monoid under ``merge``, with ``start`` as its identity.

Milakov & Gimelshein, 2018, Algorithm 3, https://arxiv.org/abs/1805.02867
Dao, FlashAttention-2, 2023, section 3.1, https://arxiv.org/abs/2307.08691
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from .._tiles.xla import dot
from .exp import exp

Exp = Callable[[Array], Array]
Weigh = Callable[[Array, Array], Array]


class State(NamedTuple):
    """Of T rows, with any axes before T."""

    m: Array  # (T,) running maximum of the logits, -inf while no key has been seen
    l: Array  # (T,) running sum of exp(s - m)
    o: Array  # (T, H) running sum of exp(s - m) v, not yet divided by l


def start(rows: int, head_dim: int, dtype: DTypeLike) -> State:
    """The state of rows that have seen no key."""
    return State(
        jnp.full((rows,), -jnp.inf, dtype),
        jnp.zeros((rows,), dtype),
        jnp.zeros((rows, head_dim), dtype),
    )


def finite_shift(m: Array) -> Array:
    """m as a shift: a row that has seen no key has m = -inf, and -inf - (-inf) would be NaN."""
    return jnp.where(jnp.isneginf(m), 0, m)


def absorb(state: State, s: Array, v: Array, weigh: Weigh = dot, exp: Exp = exp) -> State:
    """Adds one block of keys.

    Args:
        state: of T rows.
        s: (T, block_kv) logits, -inf where masked.
        v: (block_kv, H) values.
        weigh: the product of probabilities (T, block_kv) and v.
        exp: the exponential function.
    """
    m = jnp.maximum(state.m, jnp.max(s, axis=-1))
    shift = finite_shift(m)
    p = exp(s - shift[..., None])
    alpha = exp(state.m - shift)  # carries the old sums over to the new maximum
    return State(m, alpha * state.l + jnp.sum(p, axis=-1), alpha[..., None] * state.o + weigh(p, v))


def absorb_apart(state: State, s: Array, v: Array, weigh: Weigh, exp: Exp = exp) -> State:
    """As ``absorb``, with the probabilities that are weighed relative to the block's own maximum.

    That costs one more factor, and makes the most of probabilities of fixed point.
    """
    return merge(state, of_block(s, v, weigh, exp))


def of_block(
    s: Array, v: Array, weigh: Weigh, exp: Exp = exp, shift: Callable[[Array], Array] = finite_shift
) -> State:
    """The state after one block of keys; shift: what maxima become before they are subtracted."""
    m = jnp.max(s, axis=-1)
    p = exp(s - shift(m)[..., None])
    return State(m, jnp.sum(p, axis=-1), weigh(p, v))


def merge(a: State, b: State) -> State:
    """The state over the union of two disjoint sets of keys."""
    m = jnp.maximum(a.m, b.m)
    shift = finite_shift(m)
    alpha, beta = exp(a.m - shift), exp(b.m - shift)
    return State(m, alpha * a.l + beta * b.l, alpha[..., None] * a.o + beta[..., None] * b.o)


def add_logit(state: State, s: Array) -> State:
    """Adds one more key of logit s (T,) and value 0: an attention sink."""
    return merge(state, State(s, jnp.ones_like(s), jnp.zeros_like(state.o)))


def finish(state: State) -> tuple[Array, Array]:
    """Output (T, H) and natural-log lse (T,). A row that has seen no key gives 0 and -inf."""
    empty = state.l == 0
    l = jnp.where(empty, 1, state.l)
    return state.o / l[..., None], jnp.where(empty, -jnp.inf, state.m + jnp.log(l))
