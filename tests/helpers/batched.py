"""Calls of attention with batched options, and their elements."""

import functools

import jax
import numpy as np

from flash_jax import CausalMask, LengthMask, PrefixMask, SegmentMask, flash_attention

# Model level: arrays are (B, T, N, H), and options are vmapped with them.

B, T, S, N, K, H = 3, 11, 13, 4, 2, 5
attention = functools.partial(flash_attention, block_sizes=(4, 3))


def parity(b, h, q_index, k_index):
    return (b + h + q_index + k_index) % 2 == 0


RNG = np.random.default_rng(20220527)
# Arrays with a first axis B, as a batched call takes them and as vmap splits them.
BATCHED = {
    "lengths and offset": {
        "query_seq_lengths": np.array([11, 0, 7]),
        "key_value_seq_lengths": np.array([13, 5, 0]),
        "query_offset": np.array([2, -3, 0]),
        "is_causal": True,
        "local_window_size": 4,
    },
    "bias and bool mask": {
        "bias": RNG.standard_normal((B, N, T, S)).astype(np.float32),
        "mask": RNG.random((B, 1, T, S)) < 0.6,
    },
    "segments": {
        "query_segment_ids": RNG.integers(0, 2, (B, T)),
        "key_value_segment_ids": RNG.integers(0, 2, (B, S)),
    },
    "alibi": {"query_offset": np.array([2, -3, 0]), "alibi_slopes": np.float32([1, 0.5, 2, 0.1])},
    "Mask": {
        "mask": (PrefixMask(np.array([0, 2, 9])) | CausalMask(np.array([2, -3, 0])))
        & SegmentMask(RNG.integers(0, 2, (B, T)), np.zeros((B, S), np.int32))
        & LengthMask(None, np.array([13, 9, 2]))
    },
}


def split(options):
    """in_axes of the options: 0 where the first axis is B."""
    return {name: jax.tree.map(axis_of, x) for name, x in options.items()}


def axis_of(x):
    return 0 if np.ndim(x) and np.shape(x)[0] == B else None


def element(options, b):
    return jax.tree.map(lambda x: x[b] if axis_of(x) == 0 else x, options)


def traced(options):
    """The options that are arrays, and those that are not."""
    static = {"is_causal", "local_window_size", "dropout_rate"}
    return (
        {name: x for name, x in options.items() if name not in static},
        {name: x for name, x in options.items() if name in static},
    )


def mapped(qkv, options, in_axes=(0, 0, 0)):
    arrays, static = traced(options)
    call = lambda q, k, v, arrays: attention(q, k, v, **arrays, **static)  # noqa: E731
    return jax.vmap(call, in_axes=(*in_axes, split(arrays)))(*qkv, arrays)
