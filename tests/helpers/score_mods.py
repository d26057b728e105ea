"""Score functions of users, each with what it computes as NumPy arrays: for tests and examples."""

from typing import NamedTuple

import numpy as np
from jax import numpy as jnp

from flash_jax import PredicateMask

B, T, S, N = 2, 21, 27, 4
b, h, t, s = np.ogrid[:B, :N, :T, :S]


class Case(NamedTuple):
    """A call, and the same in the options of the oracle."""

    call: dict
    exact: dict


def t5(table):
    """Raffel et al., 2019, section 2.1: a learned bias by head and bucket of distance."""
    return lambda score, b, h, q_index, k_index: score + table[h, bucket(q_index - k_index, jnp)]


def bucket(distance, np_):
    """Buckets of T5 without a future: exact below 4, then by the logarithm up to 8 buckets."""
    d = np_.maximum(distance, 0)
    far = 4 + np_.log2(np_.maximum(d, 4) / 4) * 1.5
    return np_.where(d < 4, d, np_.minimum(far, 7).astype(np.int32))


def relative_position_bias(rng):
    table = rng.standard_normal((N, 8)).astype(np.float32)
    return Case({"score_mod": t5(jnp.asarray(table))}, {"bias": table[h, bucket(t - s, np)]})


def alibi(rng):
    slopes = 2.0 ** -np.arange(1, N + 1, dtype=np.float32)
    fn = lambda score, b, h, q_index, k_index: score - 2.0 ** -(h + 1.0) * (q_index - k_index)  # noqa: E731
    return Case({"score_mod": fn}, {"bias": -slopes[h] * (t - s)})


def soft_cap(rng):
    fn = lambda score, b, h, q_index, k_index: 1.5 * jnp.tanh(score / 1.5)  # noqa: E731
    return Case({"score_mod": fn}, {"logits_soft_cap": 1.5})


def documents(rng):
    ids = np.sort(rng.integers(0, 4, (B, S))).astype(np.int32)
    of = jnp.asarray(ids)
    same = lambda b, h, q_index, k_index: of[b, q_index] == of[b, k_index]  # noqa: E731
    return Case({"mask": PredicateMask(same)}, {"mask": ids[b, t] == ids[b, s]})


def prefix_lm(rng):
    lengths = np.array([5, 9], np.int32)
    of = jnp.asarray(lengths)

    def fn(score, b, h, q_index, k_index):
        return jnp.where((k_index < of[b]) | (k_index <= q_index), score, -jnp.inf)

    return Case({"score_mod": fn}, {"mask": (s < lengths[b]) | (s <= t)})


def neighbours(rng):
    """Hassani et al., 2022 (NATTEN), on a grid of 5 columns: at most 1 row and 2 columns away."""

    def near(b, h, q_index, k_index):
        return (abs(q_index // 5 - k_index // 5) <= 1) & (abs(q_index % 5 - k_index % 5) <= 2)

    def bounds(b, h, q, k):  # whole rows of the grid are too far
        return (k.first // 5 <= q.last // 5 + 1) & (k.last // 5 >= q.first // 5 - 1), False

    return Case({"mask": PredicateMask(near, bounds)}, {"mask": near(b, h, t, s)})


def dilated_window(rng):
    def dilated(b, h, q_index, k_index):
        d = q_index - k_index
        return (d >= 0) & (d <= 12) & (d % 3 == 0)

    def bounds(b, h, q, k):
        return (k.first <= q.last) & (k.last >= q.first - 12), False

    return Case({"mask": PredicateMask(dilated, bounds)}, {"mask": dilated(b, h, t, s)})


def jagged(rng):
    """Sequences of several lengths, one after the other, each with its own causal bias."""
    starts = np.array([0, 4, 11, 12, S], np.int32)
    ids = np.repeat(np.arange(4, dtype=np.int32), np.diff(starts))
    of, offsets = jnp.asarray(ids), jnp.asarray(starts)

    def fn(score, b, h, q_index, k_index):
        kept = (of[q_index] == of[k_index]) & (k_index <= q_index)
        return jnp.where(kept, score + 0.1 * (k_index - offsets[of[q_index]]), -jnp.inf)

    kept = (ids[t] == ids[s]) & (s <= t)
    return Case({"score_mod": fn}, {"mask": kept, "bias": 0.1 * (s - starts[ids[t]])})


CATALOGUE = {
    "relative position bias": relative_position_bias,
    "alibi": alibi,
    "soft cap": soft_cap,
    "documents": documents,
    "prefix LM": prefix_lm,
    "neighbours in 2-D": neighbours,
    "dilated window": dilated_window,
    "jagged batch": jagged,
}
