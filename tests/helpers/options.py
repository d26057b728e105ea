"""Small inputs and every option of model-level attention, for tests that go through them all."""

import numpy as np
import pytest
from jax import numpy as jnp

B, T, S, N, K, H, Hv = 2, 11, 17, 6, 3, 5, 3
TILES = (5, 3)  # what tests share is compiled once


def random_inputs(rng, B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv, dtype=np.float32):
    """Standard normal query, key and value in the layout of models; without B where it is None."""
    lead = () if B is None else (B,)
    shapes = (*lead, T, N, H), (*lead, S, K, H), (*lead, S, K, Hv)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def random_mask(rng, *shape):
    """Two thirds are kept, and nothing in some rows."""
    mask = rng.random(shape) < 2 / 3
    mask[..., shape[-2] // 2, :] = False
    return mask


def masking_bias(rng, *shape):
    bias = rng.standard_normal(shape).astype(np.float32)
    return np.where(random_mask(rng, *shape), bias, -np.inf).astype(np.float32)


def segments(rng, T=T, S=S):
    return {
        "query_segment_ids": np.sort(rng.integers(0, 4, (B, T))),
        "key_value_segment_ids": np.sort(rng.integers(1, 4, (B, S))),
    }


def int32(*values):
    return np.array(values, np.int32)


MASKING = {
    "mask": lambda rng: {"mask": random_mask(rng, B, N, T, S)},
    "mask of all heads": lambda rng: {"mask": random_mask(rng, B, 1, T, S)},
    "mask (T, S)": lambda rng: {"mask": random_mask(rng, T, S)},
    "mask of keys": lambda rng: {"mask": rng.random((B, 1, 1, S)) < 0.5},
    "mask of queries": lambda rng: {"mask": rng.random((N, T, 1)) < 0.5},
    "bias of -inf": lambda rng: {"bias": masking_bias(rng, B, N, T, S)},
    "bias of -inf for all heads": lambda rng: {"bias": masking_bias(rng, T, S)},
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


def everything(rng):
    return {
        "bias": np.where(rng.random((B, N, T, S)) < 0.9, rng.standard_normal((T, S)), -np.inf)
        .astype(np.float32),
        "mask": rng.random((B, N, T, S)) < 0.9,
        "scale": 0.3,
        "is_causal": True,
        "query_seq_lengths": int32(9, T),
        "key_value_seq_lengths": int32(S, 13),
        "local_window_size": (9, 2),
        "query_offset": int32(6, 3),
        "query_segment_ids": rng.integers(0, 2, (B, T)),
        "key_value_segment_ids": rng.integers(0, 2, (B, S)),
        "logits_soft_cap": 3.0,
        "sinks": rng.standard_normal(N).astype(np.float32),
        "alibi_slopes": rng.random(N).astype(np.float32),
    }  # fmt: skip


OPTIONS = MASKING | {
    "none": lambda rng: {},
    "bias": lambda rng: {"bias": rng.standard_normal((B, N, T, S)).astype(np.float32)},
    "bias of heads": lambda rng: {"bias": rng.standard_normal((N, 1, 1)).astype(np.float32)},
    "bias of keys": lambda rng: {"bias": rng.standard_normal(S).astype(jnp.bfloat16)},
    "scale": lambda rng: {"scale": 0.3},
    "negative scale": lambda rng: {"scale": -1.7},
    "soft cap": lambda rng: {"logits_soft_cap": 1.3},
    "sinks": lambda rng: {"sinks": rng.standard_normal(N).astype(np.float32)},
    "sinks of rows without keys": lambda rng: {
        "sinks": 3 * rng.standard_normal(N).astype(np.float32),
        "key_value_seq_lengths": int32(0, 5),
    },
    "alibi": lambda rng: {"alibi_slopes": rng.random(N).astype(np.float32)},
    "alibi at an offset": lambda rng: {
        "alibi_slopes": rng.random(N).astype(np.float32),
        "query_offset": int32(5, -2),
    },
    "everything": everything,
}


def by_name(options):
    return pytest.mark.parametrize("options", options.values(), ids=options)


def named(*names):
    return by_name({name: OPTIONS[name] for name in names})
