"""One call of every way through the package, for tests of what holds for all of them.

A path names its arrays and their axes (B, T, S, N, K, H and 1), so that a test can make, map or
shard them; its call takes them as a dict, and returns the output (B, T, N, Hv) and lse (B, N, T).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from flash_jax import (
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    SegmentMask,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
    flash_mha,
    flash_mha_i8,
)


class Path(NamedTuple):
    """How a test calls attention.

    Attributes:
        call: of a dict of arrays, without the batch axis only where no axes have it.
        axes: of the arrays beside query, key and value, by name.
        one_query: whether T is 1, as in decoding.
        floats: what has derivatives.
        per_shard: whether the results depend on the indices of batch elements.
    """

    call: Callable[[dict[str, Any]], tuple[Any, Any]]
    axes: Mapping[str, str] = types.MappingProxyType({})
    one_query: bool = False
    floats: tuple[str, ...] = ("query", "key", "value")
    per_shard: bool = False

    @property
    def all_axes(self) -> dict[str, str]:
        return {"query": "BTNH", "key": "BSKH", "value": "BSKH", **self.axes}

    def arrays(self, rng: np.random.Generator, **sizes: int) -> dict[str, np.ndarray]:
        """Random arrays; sizes: B, T, S, N, K and H."""
        if self.one_query:
            sizes = sizes | {"T": 1}
        return {
            name: _array(rng, name, tuple(sizes.get(axis, 1) for axis in axes), sizes)
            for name, axes in self.all_axes.items()
        }


def _array(rng, name, shape, sizes):
    match name:
        case "mask":
            return (rng.random(shape) < 0.7) | (np.arange(shape[-1]) == 0)
        case "query_seq_lengths":
            return rng.integers(1, sizes["T"] + 1, shape).astype(np.int32)
        case "key_value_seq_lengths" | "lengths":
            return rng.integers(1, sizes["S"] + 1, shape).astype(np.int32)
        case "query_offset":
            return rng.integers(0, sizes["S"], shape).astype(np.int32)
        case "query_segment_ids" | "key_value_segment_ids" | "ids":
            ids = np.sort(rng.integers(0, 2, shape), axis=-1).astype(np.int32)
            return np.where(np.arange(shape[-1]) == 0, 0, ids)
        case _:
            return rng.standard_normal(shape).astype(np.float32)


def model(attend=flash_attention_with_lse, **static):
    return lambda x: attend(**x, **static)


def masked(x):
    lengths, ids = x["lengths"], x["ids"]
    keys = jnp.zeros((ids.shape[0], x["key"].shape[1]), ids.dtype)
    mask = (CausalMask() | LengthMask(kv=lengths)) & SegmentMask(ids, keys)
    return flash_attention_with_lse(x["query"], x["key"], x["value"], mask=mask)


def kernel(x):
    config = FlashAttentionConfig(5, 3, x["query"].shape[-1], causal=True)
    q, k, v = (jnp.swapaxes(x[name], 1, 2) for name in ("query", "key", "value"))
    out = jax.vmap(functools.partial(flash_mha, config))(q, k, v)
    return jnp.swapaxes(out, 1, 2), jnp.zeros(q.shape[:3])


def kernel_i8(x):
    config = FlashAttentionConfig(5, 3, x["query"].shape[-1])
    q, k, v = (
        jnp.round(20 * jnp.swapaxes(x[name], 1, 2)).astype(np.int8)
        for name in ("query", "key", "value")
    )
    call = functools.partial(flash_mha_i8, config)
    out = jax.vmap(call, in_axes=(0, 0, 0, None, None, None))(q, k, v, x["scale"], 0.05, 0.05)
    return jnp.swapaxes(out, 1, 2), jnp.zeros(q.shape[:3])


LENGTHS = {"query_seq_lengths": "B", "key_value_seq_lengths": "B"}
PATHS = {
    "plain": Path(model()),
    "causal": Path(model(is_causal=True)),
    "window and offsets": Path(model(local_window_size=(4, 1)), {"query_offset": "B"}),
    "lengths": Path(model(), LENGTHS),
    "segments": Path(model(), {"query_segment_ids": "BT", "key_value_segment_ids": "BS"}),
    "mask": Path(model(), {"mask": "B1TS"}),
    "Mask": Path(masked, {"lengths": "B", "ids": "BT"}),
    "bias": Path(model(), {"bias": "BNTS"}, floats=("query", "key", "value", "bias")),
    "parameters": Path(
        model(logits_soft_cap=2.0),
        {"sinks": "N", "alibi_slopes": "N"},
        floats=("query", "value", "sinks", "alibi_slopes"),
    ),
    "dropout": Path(
        model(dropout_rate=0.4, dropout_rng=jax.random.key(3), is_causal=True), per_shard=True
    ),
    "broadcast dropout": Path(
        model(dropout_rate=0.4, dropout_rng=jax.random.key(3), broadcast_dropout=True)
    ),
    "decode": Path(model(is_causal=True), {"query_offset": "B"}, one_query=True),
    "INT8": Path(model(flash_attention_int8_with_lse), {"key_value_seq_lengths": "B"}),
    "kernels": Path(kernel),
    "kernels on int8": Path(kernel_i8, {"scale": ""}, floats=("scale",)),
}


def derivatives(path, x, weights):
    """The results of a path, their tangents in all floats, and the gradients of a weighed sum."""
    floats = {name: x[name] for name in path.floats}

    def results(floats):
        out, lse = path.call(x | floats)
        return out, jnp.where(jnp.isneginf(lse), 0, lse)

    primals, forward = jax.linearize(results, floats)
    backward = jax.linear_transpose(forward, floats)
    return primals, forward(jax.tree.map(jnp.cos, floats)), backward(weights)[0]
