"""The options of model-level attention: of small arrays, and of shapes where only XLA plans.

A test that goes through all of them, or through some by name, takes them from here.
"""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from flash_jax import CausalMask, LengthMask, PrefixMask, SegmentMask, WindowMask

B, T, S, N, K, H, Hv = 2, 11, 17, 6, 3, 5, 3
TILES = (5, 3)  # what tests share is compiled once


def random_inputs(rng, B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv, dtype=np.float32):
    """Standard normal query, key and value in the layout of models; without B where it is None."""
    lead = () if B is None else (B,)
    shapes = (*lead, T, N, H), (*lead, S, K, H), (*lead, S, K, Hv)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def random_mask(rng, *shape):
    """Two thirds are kept, and nothing in one row and one column."""
    mask = rng.random(shape) < 2 / 3
    mask[..., shape[-2] // 2, :] = False
    mask[..., shape[-1] // 3] = False
    return mask


def masking_bias(rng, *shape):
    bias = rng.standard_normal(shape).astype(np.float32)
    return np.where(random_mask(rng, *shape), bias, -np.inf).astype(np.float32)


def segments(rng, B=B, T=T, S=S):
    return {
        "query_segment_ids": np.sort(rng.integers(0, 4, (B, T))),
        "key_value_segment_ids": np.sort(rng.integers(1, 4, (B, S))),
    }


def int32(*values):
    return np.array(values, np.int32)


LENGTHS = {
    "query_seq_lengths": int32(7, 0),
    "key_value_seq_lengths": int32(13, S),
    "is_causal": True,
    "query_offset": int32(5, -2),
}
MASKING = {
    "mask": lambda rng: {"mask": random_mask(rng, B, N, T, S)},
    "mask of keys": lambda rng: {"mask": rng.random((B, 1, 1, S)) < 0.5},
    "mask of queries": lambda rng: {"mask": rng.random((N, T, 1)) < 0.5},
    "bias of -inf": lambda rng: {"bias": masking_bias(rng, B, N, T, S)},
    "causal": lambda rng: {"is_causal": True},
    "causal bottom-right": lambda rng: {"is_causal": True, "query_offset": S - T},
    "causal per element": lambda rng: {"is_causal": True, "query_offset": int32(7, -4)},
    "window": lambda rng: {"local_window_size": 2},
    "window of one key": lambda rng: {"local_window_size": (0, 0), "query_offset": int32(9, 0)},
    "window open left": lambda rng: {"local_window_size": (None, 1), "query_offset": -3},
    "window open right": lambda rng: {"local_window_size": (2, None), "query_offset": 11},
    "causal window": lambda rng: {
        "local_window_size": (3, 5),
        "is_causal": True,
        "query_offset": 4,
    },
    "lengths of queries": lambda rng: {"query_seq_lengths": int32(7, 0)},
    "lengths of keys": lambda rng: {"key_value_seq_lengths": int32(0, 13)},
    "lengths": lambda rng: {
        "query_seq_lengths": int32(T, 4),
        "key_value_seq_lengths": int32(1, S),
    },
    "segments": lambda rng: segments(rng),
}


def parameters(rng, N=N, dtype=np.float32):
    """Every parameter of the scores but the bias, as arrays, which have derivatives."""
    return {
        "scale": np.array(0.3, dtype),
        "logits_soft_cap": np.array(1.7, dtype),
        "alibi_slopes": rng.random(N).astype(dtype),
        "sinks": rng.standard_normal(N).astype(dtype),
    }


def everything(rng, dtype=np.float32):
    kept = rng.random((B, N, T, S)) < 0.9
    return {
        "bias": np.where(kept, rng.standard_normal((T, S)), -np.inf).astype(dtype),
        "mask": rng.random((B, N, T, S)) < 0.9,
        "is_causal": True,
        "query_seq_lengths": int32(9, T),
        "key_value_seq_lengths": int32(S, 13),
        "local_window_size": (9, 2),
        "query_offset": int32(6, 3),
        "query_segment_ids": rng.integers(0, 2, (B, T)),
        "key_value_segment_ids": rng.integers(0, 2, (B, S)),
        **parameters(rng, dtype=dtype),
    }


def bias(*shape, dtype=np.float32):
    return lambda rng: {"bias": np.asarray(rng.standard_normal(shape)).astype(dtype)}


def bent(score, b, h, q_index, k_index):
    """A function of scores in operators that NumPy and JAX have alike."""
    return score * (1 + h / 8) - abs(q_index - k_index) / (4 + b)


OPTIONS = MASKING | {
    "none": lambda rng: {},
    "bias": bias(B, N, T, S),
    "bias of keys": bias(S, dtype=jnp.bfloat16),
    "scale": lambda rng: {"scale": 0.3},
    "negative scale": lambda rng: {"scale": -1.7},
    "soft cap": lambda rng: {"logits_soft_cap": 1.3},
    "sinks": lambda rng: {"sinks": rng.standard_normal(N).astype(np.float32)},
    "alibi": lambda rng: {"alibi_slopes": rng.random(N).astype(np.float32)},
    "score mod": lambda rng: {"score_mod": bent},
    "score mod and others": lambda rng: everything(rng) | {"score_mod": bent},
    "parameters": lambda rng: parameters(rng) | {"query_offset": int32(5, -2)},
    "lengths and sinks": lambda rng: LENGTHS | {"sinks": rng.standard_normal(N).astype(np.float32)},
    "everything": everything,
}
# Whose gradients are sums over other axes.
BIASES = {f"bias {shape}": bias(*shape) for shape in [(1, N, 1, S), (B, 1, T, 1), (T, S), ()]}


def by_name(options):
    return pytest.mark.parametrize("options", options.values(), ids=options)


def named(*names):
    return by_name({name: (OPTIONS | BIASES)[name] for name in names})


# Options as shapes, of T queries and keys, for programs that are compiled and not run.


def spec(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ids(*shape):
    return spec(*shape, dtype=np.int32)


SHAPES = {
    "none": lambda T: {},
    "parameters and dropout": lambda T: {
        "scale": spec(),
        "logits_soft_cap": spec(),
        "alibi_slopes": spec(2),
        "sinks": spec(2),
        "dropout_rate": 0.1,
        "dropout_rng": spec(2, dtype=np.uint32),
    },
    "masks": lambda T: {
        "is_causal": True,
        "query_offset": ids(1),
        "local_window_size": (1000, 3),
        "query_seq_lengths": ids(1),
        "key_value_seq_lengths": ids(1),
        "query_segment_ids": ids(1, T),
        "key_value_segment_ids": ids(1, T),
        "mask": (PrefixMask(ids(1)) | CausalMask(ids()))
        & WindowMask(100, None)
        & SegmentMask(ids(T), ids(1, T))
        & LengthMask(None, ids(1)),
    },
    "mask and bias of keys": lambda T: {
        "mask": spec(1, 1, 1, T, dtype=bool),
        "bias": spec(1, 2, 1, T),
    },
    "mask and bias of queries": lambda T: {"mask": spec(T, 1, dtype=bool), "bias": spec(T, 1)},
}
DIFFERENTIABLE = (
    "query", "key", "value", "bias", "scale", "logits_soft_cap", "alibi_slopes", "sinks"
)  # fmt: skip
STATIC = "score_mod", "is_causal", "local_window_size", "dropout_rate", "block_sizes"


def split(call):
    """A call's differentiable arrays, its other arrays, and what is compiled in."""
    differentiable = {name: call[name] for name in DIFFERENTIABLE if name in call}
    static = tuple((name, call[name]) for name in STATIC if name in call)
    arrays = {name: x for name, x in call.items() if name not in (*DIFFERENTIABLE, *STATIC)}
    return differentiable, arrays, static
