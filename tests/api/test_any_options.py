"""Any options together, drawn at random."""

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st
from options import TILES, masking_bias, random_inputs, random_mask
from oracle import assert_within_bound, attention

from flash_jax import flash_attention_with_lse

SHAPES = [(2, 7, 13, 6, 3), (1, 17, 11, 4, 1), (3, 5, 5, 2, 2)]  # B, T, S, N, K
bits = st.booleans()


@st.composite
def calls(draw):
    """Sizes, options that are compiled in, the names of the others, and a seed for their values."""
    static = {
        "is_causal": draw(bits),
        "local_window_size": draw(st.sampled_from([None, 3, (2, None), (None, 1), (4, 0)])),
        "block_sizes": draw(st.sampled_from([TILES, (8, 16), None])),
    }
    names = draw(st.sets(st.sampled_from(sorted(DRAWN))))
    return draw(st.sampled_from(SHAPES)), static, sorted(names), draw(st.integers(0, 2**32 - 1))


DRAWN = {
    "bias": lambda rng, B, T, S, N: {
        "bias": masking_bias(rng, *[(N, T, S), (B, 1, T, S), (T, S)][rng.integers(3)])
    },
    "mask": lambda rng, B, T, S, N: {
        "mask": random_mask(rng, *[(N, T, S), (B, 1, T, S), (T, S)][rng.integers(3)])
    },
    "scale": lambda rng, *_: {"scale": np.float32(rng.normal())},
    "soft cap": lambda rng, *_: {"logits_soft_cap": np.float32(rng.uniform(0.5, 9))},
    "sinks": lambda rng, B, T, S, N: {"sinks": rng.standard_normal(N).astype(np.float32)},
    "alibi": lambda rng, B, T, S, N: {"alibi_slopes": rng.random(N).astype(np.float32)},
    "offset": lambda rng, B, T, S, N: {
        "query_offset": rng.integers(-T, S + 3, [(), (B,)][rng.integers(2)], np.int32)
    },
    "lengths of queries": lambda rng, B, T, S, N: {
        "query_seq_lengths": rng.integers(0, T + 1, B, np.int32)
    },
    "lengths of keys": lambda rng, B, T, S, N: {
        "key_value_seq_lengths": rng.integers(0, S + 1, B, np.int32)
    },
    "segments": lambda rng, B, T, S, N: {
        "query_segment_ids": np.sort(rng.integers(0, 3, (B, T), np.int32)),
        "key_value_segment_ids": np.sort(rng.integers(0, 3, (B, S), np.int32)),
    },
}


@hypothesis.settings(derandomize=True, deadline=None, max_examples=10, database=None)
@hypothesis.given(calls())
def test_any_traced_options_together_agree_with_the_oracle(call):
    (B, T, S, N, K), static, names, seed = call
    rng = np.random.default_rng(seed)
    inputs = random_inputs(rng, B, T, S, N, K)
    traced = {}
    for name in names:
        traced |= DRAWN[name](rng, B, T, S, N)
    run = jax.jit(lambda inputs, traced: flash_attention_with_lse(*inputs, **traced, **static))
    results = run(inputs, traced)
    options = traced | {name: x for name, x in static.items() if name != "block_sizes"}
    exact, plain = (attention(*inputs, **options, dtype=dtype) for dtype in (None, np.float32))
    assert_within_bound(results, exact, plain, np.float32)
