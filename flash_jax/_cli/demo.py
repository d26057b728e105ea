"""The demonstration: attention alone, with nothing learned, predicts the next byte of a text.

One head reads a text of n bytes x_0 .. x_{n-1}. With random Gaussian codes C_1 .. C_L, one per byte
value and lag, and random +-1 codes D, one per byte value, position s has

    key    k_s = c_s / |c_s|,   c_s = sum_{l=1..L} 0.8^l C_l[x_{s-l}]
    value  v_s = D[x_s]
    query  q_t = 30 k_t

so q_t . k_s is large where the bytes before t agree with those before s, and near bytes count
more than far ones. Position t thus looks up what followed the contexts most like its own. It reads
s < t only: neither its own byte nor a later one. The prediction is the byte whose code is nearest
to the output.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from .._api.attention_int8 import flash_attention_int8
from .._api.config import FlashAttentionConfig
from .._api.kernels import flash_attention_forward
from .._tiles.axis import BlockSizes
from .inputs import InputError

HEAD_DIM = 128
LAGS = 8
DECAY = 0.8
# With 20, 30 and 40, accuracies on Python's typing.py lie within one percentage point.
SHARPNESS = 30.0
MIN_BYTES = 2
# The kernels refuse longer axes.
MAX_BYTES = 2**30

_COMPARED = 1024  # positions whose full score matrix is small enough to build
_CHUNK = 4096  # positions decoded at once

Step = Callable[[str], AbstractContextManager[Any]]


class Codes(NamedTuple):
    """Random codes, which stand in for learned weights."""

    context: np.ndarray  # (LAGS, 256, HEAD_DIM) float32
    byte: np.ndarray  # (256, HEAD_DIM) float32, +-1


class Operands(NamedTuple):
    """What the causal kernel reads: row i predicts byte i + 1 and may read bytes 0..i."""

    q: Array  # (n - 1, HEAD_DIM)
    k: Array  # (n - 1, HEAD_DIM)
    v: Array  # (n - 1, HEAD_DIM)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run predicted, and what it cost."""

    products: str  # dtype of what is multiplied: float32 or int8
    right: np.ndarray  # (n - 1,) bool: byte i + 1 was predicted
    common: int  # the most frequent byte among bytes 1..n-1
    baseline: float  # share of positions where that byte is the right one
    tiles: BlockSizes
    compile_seconds: float
    run_seconds: float
    temp_bytes: int
    compared: int  # positions compared with jax.nn
    difference: float  # largest absolute difference of the outputs there

    @property
    def positions(self) -> int:
        """Number of predicted positions, T = S."""
        return len(self.right)

    @property
    def accuracy(self) -> float:
        """Share of bytes predicted right."""
        return float(self.right.mean())

    @property
    def late_accuracy(self) -> float:
        """Share of bytes predicted right in the second half, where there is more to look up."""
        return float(self.right[self.positions // 2 :].mean())

    @property
    def gflops(self) -> float:
        """GFLOP/s of the two products, counting only the causal half."""
        return 4 * self.positions**2 * HEAD_DIM / 2 / self.run_seconds / 1e9

    @property
    def score_bytes(self) -> int:
        """Bytes that the full float32 score matrix would take."""
        return 4 * self.positions**2


def read_text(path: str | Path, max_bytes: int) -> np.ndarray:
    """Reads the first max_bytes bytes of a UTF-8 text file, (n,) uint8.

    Raises:
        InputError: the file can't be read, has fewer than two bytes, or is not UTF-8 text.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes)
            cut = bool(file.read(1))
    except (OSError, ValueError) as error:  # a NUL character in the name is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"FILE must be a readable file; {str(path)!r}: {reason}") from error
    if len(content) < MIN_BYTES:
        found = f"has {len(content)}" if content else "is empty"
        raise InputError(f"FILE must have at least {MIN_BYTES} bytes; {str(path)!r} {found}")
    if 0 in content:
        where = f"has a NUL byte at {content.index(0)}"
        raise InputError(f"FILE must be text; {str(path)!r} {where}")
    try:
        # max_bytes may end inside a character.
        codecs.getincrementaldecoder("utf-8")().decode(content, final=not cut)
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise InputError(f"FILE must be UTF-8 text; {str(path)!r}: {where}") from error
    return np.frombuffer(content, np.uint8)


def random_codes(seed: int) -> Codes:
    """Draws the codes that belong to a seed."""
    rng = np.random.default_rng(seed)
    context = rng.standard_normal((LAGS, 256, HEAD_DIM), np.float32)
    byte = 2 * rng.integers(0, 2, (256, HEAD_DIM)).astype(np.float32) - 1
    return Codes(context, byte)


def encode(data: np.ndarray, codes: Codes) -> Operands:
    """Encodes (n,) bytes: queries at positions 1..n-1, keys and values at positions 0..n-2."""
    k = np.zeros((len(data), HEAD_DIM), np.float32)
    for lag, code in enumerate(codes.context, 1):
        k[lag:] += np.float32(DECAY**lag) * code[data[:-lag]]
    # Position 0 has no context: its key is zero.
    k[1:] /= np.linalg.norm(k[1:], axis=1, keepdims=True)
    q = np.float32(SHARPNESS) * k[1:]
    return Operands(jnp.asarray(q), jnp.asarray(k[:-1]), jnp.asarray(codes.byte[data[:-1]]))


def decode(out: np.ndarray, codes: Codes) -> np.ndarray:
    """Finds the byte with the nearest code, uint8, for each row of out (n - 1, HEAD_DIM)."""
    chunks = [out[i : i + _CHUNK] @ codes.byte.T for i in range(0, len(out), _CHUNK)]
    return np.concatenate([np.argmax(chunk, axis=1) for chunk in chunks]).astype(np.uint8)


def configure(
    positions: int, block_sizes: BlockSizes | None = None, products: str = "float32"
) -> FlashAttentionConfig:
    """Configures causal attention over the positions, with these tiles or the fastest known."""
    if block_sizes is not None:
        return FlashAttentionConfig(*block_sizes, HEAD_DIM, causal=True, softmax_scale=1.0)
    return FlashAttentionConfig.auto(
        HEAD_DIM, positions, positions, causal=True, softmax_scale=1.0, int8=products == "int8"
    )


def attend_int8(config: FlashAttentionConfig, q: Array, k: Array, v: Array) -> Array:
    """Computes ``flash_attention_forward`` in 8 bits: it takes floats and quantizes them."""
    q, k, v = (x[:, None] for x in (q, k, v))
    blocks, scale = config.block_sizes, config.scale
    return flash_attention_int8(q, k, v, scale=scale, is_causal=True, block_sizes=blocks)[:, 0]


ATTENTION = {"float32": flash_attention_forward, "int8": attend_int8}


def predict(data: np.ndarray, codes: Codes, block_sizes: BlockSizes | None = None) -> np.ndarray:
    """Predicts bytes 1..n-1, (n - 1,) uint8, each from the bytes before it only."""
    config = configure(len(data) - 1, block_sizes)
    out = flash_attention_forward(config, *encode(data, codes))
    return decode(np.asarray(out), codes)


def difference_from_jax(operands: Operands, out: Array) -> float:
    """Finds the largest absolute difference between out and the same rows of ``jax.nn``."""
    return float(_difference(*operands, out))


@jax.jit
def _difference(q: Array, k: Array, v: Array, out: Array) -> Array:
    q, k, v = (x[: len(out), None] for x in (q, k, v))
    expected = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True)
    return jnp.max(jnp.abs(expected[:, 0] - out))


def measure(
    data: np.ndarray,
    seed: int,
    block_sizes: BlockSizes | None,
    step: Step,
    products: Sequence[str] = ("float32",),
) -> list[Result]:
    """Predicts bytes 1..n-1, times every step, and compares the output with ``jax.nn``'s.

    Args:
        data: (n,) uint8, n > 1.
        seed: seed of the random codes.
        block_sizes: positions per tile; None picks the fastest known.
        step: gives, for a step's name, the context that the step runs in.
        products: dtypes to multiply, each "float32" or "int8".

    Returns:
        One result for each of products.
    """
    with step("encoding"):
        codes = random_codes(seed)
        operands = encode(data, codes)
    return [_measure(data, codes, operands, block_sizes, step, name) for name in products]


def _measure(
    data: np.ndarray,
    codes: Codes,
    operands: Operands,
    block_sizes: BlockSizes | None,
    step: Step,
    products: str,
) -> Result:
    T = len(data) - 1
    config = configure(T, block_sizes, products)
    with step("compiling"):
        start = time.perf_counter()
        attention = functools.partial(ATTENTION[products], config)
        compiled = jax.jit(attention).lower(*operands).compile()
        compile_seconds = time.perf_counter() - start
    with step("attention"):
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(*operands))
        run_seconds = time.perf_counter() - start
    with step("decoding"):
        right = decode(np.asarray(out), codes) == data[1:]
    with step("comparing"):
        compared = min(T, _COMPARED)
        prefix = Operands(*(x[:compared] for x in operands))
        difference = difference_from_jax(prefix, out[:compared])
        counts = np.bincount(data[1:], minlength=256)
    memory = compiled.memory_analysis()
    assert memory is not None  # XLA gives it on CPUs
    return Result(
        products=products,
        right=right,
        common=int(counts.argmax()),
        baseline=float(counts.max() / T),
        tiles=BlockSizes(*(min(T, block) for block in config.block_sizes)),
        compile_seconds=compile_seconds,
        run_seconds=run_seconds,
        temp_bytes=memory.temp_size_in_bytes,
        compared=compared,
        difference=difference,
    )
