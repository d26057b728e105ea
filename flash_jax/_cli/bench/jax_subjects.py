"""Subjects built on JAX: this library, ``jax.nn``, and what the machine could do at best."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..._api.attend import attend
from ..._api.attention import flash_attention
from ..._api.attention_int8 import flash_attention_int8
from ..._api.cache import KVCache
from ..._api.core_mesh import core_mesh
from .cases import Case
from .subjects import MATMUL, Subject


def ours(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Compiles flash_attention."""
    return _compiled(case, flash_attention, inputs)


def ours_int8(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Compiles flash_attention_int8."""
    return _compiled(case, flash_attention_int8, inputs)


def ours_cached(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Compiles attend, with keys and values in a KVCache of their dtype."""
    return _cached(case, inputs, case.dtype)


def ours_cached_int8(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Compiles attend, with keys and values in a KVCache of int8."""
    return _cached(case, inputs, "int8")


def _cached(case: Case, inputs: list[np.ndarray], dtype: str) -> Subject:
    query, key, value = _placed(case, inputs[:3])
    cache = KVCache.empty(case.B, case.S, case.K, case.H, dtype=dtype).append(key, value)
    return _subject(
        lambda q, cache: (attend(q, cache, is_causal=case.is_causal),), [query, cache], 1
    )


def jax_nn(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Compiles jax.nn.dot_product_attention."""
    return _compiled(case, jax.nn.dot_product_attention, inputs)


def best_of_machine(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Compiles only what bounds the case: XLA's matrix product, or the sum of as many bytes."""
    del inputs
    if case.bound_by_memory:
        x, function = jnp.ones((case.nbytes // 4,), np.float32), jax.jit(jnp.sum)
    else:
        draw = np.random.default_rng(0).standard_normal((MATMUL, MATMUL), np.float32)
        x, function = jnp.asarray(draw, case.dtype), jax.jit(lambda x: jnp.matmul(x, x))
    return Subject(lambda: function(x).block_until_ready(), lambda: [])


def _placed(case: Case, inputs: list[np.ndarray]) -> list[Array]:
    """Query, key, value and cotangent on the devices; ``jit`` then divides the work."""
    inputs = [x.astype(jnp.dtype(case.dtype)) for x in inputs]
    if case.devices == 1 or case.divided is None:
        return [jax.device_put(x) for x in inputs]
    names = "batch", "heads", "queries"
    devices = core_mesh(case.devices).devices.reshape(case.divided)
    of_queries, of_keys = (
        NamedSharding(Mesh(devices, names), PartitionSpec("batch", positions, "heads"))
        for positions in ("queries", None)
    )
    return [jax.device_put(x, of_keys if i in (1, 2) else of_queries) for i, x in enumerate(inputs)]


def _compiled(case: Case, attention: Callable[..., Array], inputs: list[np.ndarray]) -> Subject:
    """Compiles attention, or with a gradient also its backward pass at a cotangent."""
    call = functools.partial(attention, is_causal=case.is_causal, **case.options)

    def run(q: Array, k: Array, v: Array, *cotangent: Array) -> tuple[Array, ...]:
        if not case.gradient:
            return (call(q, k, v),)
        output, pull = jax.vjp(call, q, k, v)
        return output, *pull(*cotangent)

    return _subject(run, _placed(case, inputs), 1 + case.gradient)


def _subject(run: Callable[..., tuple[Array, ...]], arrays: list[Any], results: int) -> Subject:
    start = time.perf_counter()
    compiled = jax.jit(run).lower(*arrays).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Subject(
        lambda: jax.block_until_ready(compiled(*arrays)),
        lambda: [np.asarray(x, np.float32) for x in compiled(*arrays)[:results]],
        seconds,
        None if memory is None else memory.temp_size_in_bytes,
    )
