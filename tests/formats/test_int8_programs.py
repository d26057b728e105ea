"""What is compiled of attention in 8 bits: products of bytes, in linear memory."""

import functools
import re

import jax
import numpy as np
import pytest
from integers import SCALES
from jax import numpy as jnp
from unoptimized import UNOPTIMIZED

from flash_jax import (
    FlashAttentionConfig,
    QuantizedArray,
    flash_attention_forward_i8,
    flash_attention_int8,
)
from flash_jax._machine.processor import machine

# --- The integers in the compiled program


DOT = re.compile(r" = (\w+)\[[\d,]*\]\S* dot\((.*?)\), ")
TYPE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[")


def dots(function, *arguments):
    """(result, left, right) types of all matrix products."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = []
    for computation in text.split("\n\n"):
        types = dict(m.groups() for line in computation.splitlines() if (m := TYPE.match(line)))
        for result, operands in DOT.findall(computation):
            names = [re.findall(r"%([\w.-]+)", part)[-1] for part in operands.split(",")[:2]]
            found.append((result, *(types[name] for name in names)))
    return found


WEIGHING = {
    "uint8": ("s32", "u8", "s8"),
    "bfloat16": ("f32", "bf16", "bf16"),
    "float32": ("f32", "f32", "f32"),
}


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize(
    ("T", "probability_dtype"),
    [(1, "uint8"), (1, "bfloat16"), (257, "uint8"), (257, "bfloat16"), (257, "float32")],
)
def test_products_are_of_bytes(T, probability_dtype):
    x = jax.ShapeDtypeStruct((1, T, 4, 64), np.float32)
    kv = jax.ShapeDtypeStruct((1, 517, 2, 64), np.float32)
    call = functools.partial(flash_attention_int8, probability_dtype=probability_dtype)
    found = dots(functools.partial(call, is_causal=True, query_offset=3), x, kv, kv)
    assert found
    here = machine()
    kernels = {("f32", "bf16", "bf16")} if here.one_kernel and here.bfloat16 and T > 1 else set()
    assert set(found) == {("s32", "u8", "s8"), WEIGHING[probability_dtype]} | kernels


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("T", [1, 130])
def test_kernel_products_are_of_bytes(T):
    q, kv = (jax.ShapeDtypeStruct((n, 64), np.int8) for n in (T, 129))
    config = FlashAttentionConfig(64, 64, 64, causal=True)
    call = functools.partial(flash_attention_forward_i8, config)
    assert set(dots(call, q, kv, kv, *SCALES)) == {("s32", "u8", "s8")}


# --- Memory


def temporary_bytes(call, *arguments):
    return jax.jit(call).lower(*arguments).compile(UNOPTIMIZED).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("is_causal", "with_gradient"), [(False, False), (True, True)])
def test_memory_is_linear(is_causal, with_gradient):
    def call(q, k, v):
        return jnp.sum(flash_attention_int8(q, k, v, is_causal=is_causal))

    call = jax.grad(call, (0, 1, 2)) if with_gradient else call
    small, large = (
        temporary_bytes(call, *[jax.ShapeDtypeStruct((1, T, 2, 16), np.float32)] * 3)
        for T in (2**14, 2**16)
    )
    assert large <= 4.2 * small
    assert large < 2**32 / 16  # far below one byte per pair


def test_a_quantized_cache_is_not_spread_to_floats():
    """Neither 4 bytes per entry, nor a float scale per entry."""
    S = 2**17
    cache = QuantizedArray(
        jax.ShapeDtypeStruct((1, S, 2, 64), np.int8),
        jax.ShapeDtypeStruct((1, S // 64, 2, 1), np.float32),
        (1, 64, 1, 64),
    )
    query = jax.ShapeDtypeStruct((1, 2, 4, 64), np.float32)
    call = functools.partial(flash_attention_int8, probability_dtype="bfloat16")
    assert temporary_bytes(call, query, cache, cache) < 3 * S * 2 * 64
