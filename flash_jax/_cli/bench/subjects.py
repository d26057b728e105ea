"""What runs a case: this library, ``jax.nn``, and the peers that are installed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from ..._api.attention import flash_attention
from ..._api.attention_int8 import flash_attention_int8
from . import peers
from .cases import Case

OURS, OURS_INT8 = "flash_jax", "flash_jax int8"


class Subject(NamedTuple):
    """One implementation on one case."""

    run: Callable[[], object]  # returns when the work is done
    output: Callable[[], np.ndarray]  # gives the forward pass's output, (B, T, N, H)
    compile_seconds: float | None
    temporary_bytes: int | None


def random_inputs(case: Case, seed: int = 0) -> list[Array]:
    """Draws query, key and value from a standard normal distribution, in the case's dtype."""
    rng = np.random.default_rng(seed)
    shapes = ((case.T, case.N), (case.S, case.K), (case.S, case.K))
    return [
        jnp.asarray(rng.standard_normal((case.B, *shape, case.H)), case.dtype) for shape in shapes
    ]


def _of_jax(case: Case, function: Callable[..., Array], inputs: list[Array]) -> Subject:
    """Compiles a function of the inputs, or for a gradient case also the gradient of its sum."""
    timed = function
    if case.gradient:
        timed = jax.value_and_grad(lambda *x: jnp.sum(function(*x)), (0, 1, 2))
    start = time.perf_counter()
    compiled = jax.jit(timed).lower(*inputs).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Subject(
        lambda: jax.block_until_ready(compiled(*inputs)),
        lambda: np.asarray(jax.jit(function)(*inputs), np.float32),
        seconds,
        None if memory is None else memory.temp_size_in_bytes,
    )


def _of_peer(run: peers.Run | None) -> Subject | None:
    return run and Subject(run, lambda: np.swapaxes(run(), 1, 2), None, None)


def _ours(case: Case, inputs: list[Array]) -> Subject:
    call = functools.partial(flash_attention, is_causal=case.is_causal, **case.options)
    return _of_jax(case, call, inputs)


def _ours_int8(case: Case, inputs: list[Array]) -> Subject | None:
    if case.gradient:
        return None
    call = functools.partial(flash_attention_int8, is_causal=case.is_causal, **case.options)
    return _of_jax(case, call, inputs)


def _jax_nn(case: Case, inputs: list[Array]) -> Subject | None:
    if "query_segment_ids" in case.options:
        return None
    options: dict[str, Any] = case.options | {"is_causal": case.is_causal}
    return _of_jax(case, functools.partial(jax.nn.dot_product_attention, **options), inputs)


def _peer(function: Callable[..., peers.Run | None]) -> Callable[..., Subject | None]:
    def subject(case: Case, inputs: list[Array]) -> Subject | None:
        return _of_peer(function(case, *(np.asarray(x, np.float32) for x in inputs)))

    return subject


_OPENVINO = peers.openvino_attention
SUBJECTS: dict[str, Callable[[Case, list[Array]], Subject | None]] = {
    OURS: _ours,
    OURS_INT8: _ours_int8,
    "jax.nn": _jax_nn,
    "PyTorch": _peer(peers.torch_attention),
    "ONNX Runtime": _peer(peers.onnxruntime_attention),
    "OpenVINO": _peer(functools.partial(_OPENVINO, precision="f32")),
    "OpenVINO bf16": _peer(functools.partial(_OPENVINO, precision="bf16")),
}
