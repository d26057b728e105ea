"""The demonstration: attention alone, with nothing learned, predicts the next byte of a text.

One head reads a text of n bytes x_0 .. x_{n-1}. With random Gaussian codes C_1 .. C_L, one per byte
value and lag, and random +-1 codes D, position s has

    key    k_s = c_s / |c_s|,   c_s = sum_{l=1..L} 0.8^l C_l[x_{s-l}]
    value  v_s = D[x_s]
    query  q_t = 30 k_t

so q_t . k_s is large where the bytes before t and before s agree, the nearest ones most, and
position t looks up what followed the contexts most like its own. It may read s < t only: neither
its own byte nor a later one. The prediction is the byte whose code is nearest to the output.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
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
from .._tiles.tile import BlockSizes

HEAD_DIM = 128
LAGS = 8
DECAY = 0.8
# On Python's typing.py 20, 30 and 40 differ by less than a percent of the bytes.
SHARPNESS = 30.0
MIN_BYTES = 2
# The kernels take no longer axes.
MAX_BYTES = 2**30

_COMPARED = 1024  # positions whose full score matrix is small enough to build
_CHUNK = 4096  # positions decoded at once
_WINDOW = 2048  # positions that the curve of a plot averages
_PLOT_KINDS = (".png", ".svg", ".pdf")

Step = Callable[[str], AbstractContextManager[Any]]


class InputError(Exception):
    """The user's input cannot be worked with; the message is for the user, on one line."""


class Codes(NamedTuple):
    """Random codes: all that stands in for learned weights."""

    context: np.ndarray  # (LAGS, 256, HEAD_DIM) float32
    byte: np.ndarray  # (256, HEAD_DIM) float32, +-1


class Operands(NamedTuple):
    """What the causal kernel gets: row i predicts byte i + 1 and may read bytes 0..i."""

    q: Array  # (n - 1, HEAD_DIM)
    k: Array  # (n - 1, HEAD_DIM)
    v: Array  # (n - 1, HEAD_DIM)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave and what it took."""

    products: str  # what is multiplied: float32 or int8
    right: np.ndarray  # (n - 1,) bool: byte i + 1 was predicted
    common: int  # the most frequent byte of x_1 .. x_{n-1}
    baseline: float  # share of bytes that predicting it everywhere gets right
    tiles: BlockSizes
    compile_seconds: float
    run_seconds: float
    temp_bytes: int
    compared: int  # positions compared with jax.nn
    difference: float  # largest absolute difference of the outputs there

    @property
    def positions(self) -> int:
        """Predicted positions: T = S."""
        return len(self.right)

    @property
    def accuracy(self) -> float:
        """Share of bytes predicted right."""
        return float(self.right.mean())

    @property
    def late_accuracy(self) -> float:
        """The same in the second half, where there is more to look up."""
        return float(self.right[self.positions // 2 :].mean())

    @property
    def gflops(self) -> float:
        """10^9 floating-point operations per second of the two products, causal half only."""
        return 4 * self.positions**2 * HEAD_DIM / 2 / self.run_seconds / 1e9

    @property
    def score_bytes(self) -> int:
        """Bytes of the full float32 score matrix."""
        return 4 * self.positions**2


def read_text(path: str | Path, max_bytes: int) -> np.ndarray:
    """The first max_bytes bytes of a UTF-8 text file, uint8.

    Raises:
        InputError: the file can't be read, has fewer than two bytes, or is no text.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes)
            cut = bool(file.read(1))
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
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
    """The codes that belong to a seed."""
    rng = np.random.default_rng(seed)
    context = rng.standard_normal((LAGS, 256, HEAD_DIM), np.float32)
    byte = 2 * rng.integers(0, 2, (256, HEAD_DIM)).astype(np.float32) - 1
    return Codes(context, byte)


def encode(data: np.ndarray, codes: Codes) -> Operands:
    """Queries of bytes 1..n-1, keys and values of bytes 0..n-2."""
    k = np.zeros((len(data), HEAD_DIM), np.float32)
    for lag, code in enumerate(codes.context, 1):
        k[lag:] += np.float32(DECAY**lag) * code[data[:-lag]]
    # Position 0 has no context: its key is zero.
    k[1:] /= np.linalg.norm(k[1:], axis=1, keepdims=True)
    q = np.float32(SHARPNESS) * k[1:]
    return Operands(jnp.asarray(q), jnp.asarray(k[:-1]), jnp.asarray(codes.byte[data[:-1]]))


def decode(out: np.ndarray, codes: Codes) -> np.ndarray:
    """The byte whose code is nearest to each output, uint8."""
    chunks = [out[i : i + _CHUNK] @ codes.byte.T for i in range(0, len(out), _CHUNK)]
    return np.concatenate([np.argmax(chunk, axis=1) for chunk in chunks]).astype(np.uint8)


def configure(
    positions: int, block_sizes: BlockSizes | None = None, products: str = "float32"
) -> FlashAttentionConfig:
    """Causal attention over the positions, with these tiles or the fastest known."""
    if block_sizes is not None:
        return FlashAttentionConfig(*block_sizes, HEAD_DIM, causal=True, softmax_scale=1.0)
    return FlashAttentionConfig.auto(
        HEAD_DIM, positions, positions, causal=True, softmax_scale=1.0, int8=products == "int8"
    )


def attend_int8(config: FlashAttentionConfig, q: Array, k: Array, v: Array) -> Array:
    """``flash_attention_forward`` of floats, quantized inside."""
    q, k, v = (x[:, None] for x in (q, k, v))
    blocks, scale = config.block_sizes, config.scale
    return flash_attention_int8(q, k, v, scale=scale, is_causal=True, block_sizes=blocks)[:, 0]


ATTENTION = {"float32": flash_attention_forward, "int8": attend_int8}


def predict(data: np.ndarray, codes: Codes, block_sizes: BlockSizes | None = None) -> np.ndarray:
    """Predictions of bytes 1..n-1, uint8; each from the bytes before it only."""
    config = configure(len(data) - 1, block_sizes)
    out = flash_attention_forward(config, *encode(data, codes))
    return decode(np.asarray(out), codes)


def difference_from_jax(operands: Operands, out: Array) -> float:
    """Largest absolute difference of the first rows of out from ``jax.nn``'s attention."""
    q, k, v = (x[: len(out), None] for x in operands)
    expected = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True)
    return float(jnp.max(jnp.abs(expected[:, 0] - out)))


def measure(
    data: np.ndarray,
    seed: int,
    block_sizes: BlockSizes | None,
    step: Step,
    products: Sequence[str] = ("float32",),
) -> list[Result]:
    """``predict``, with every step announced, timed and compared.

    Args:
        data: (n,) uint8, n > 1.
        seed: of the random codes.
        block_sizes: positions per tile; None: the fastest known.
        step: entered with a step's name while that step runs.
        products: what to multiply, "float32" or "int8"; a result for each.
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
    assert memory is not None  # it is on CPUs
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


def report(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The rows of the table: what, and how much of each result."""
    first = results[0]
    common = repr(chr(first.common)) if first.common < 128 else f"0x{first.common:02x}"
    rows: dict[str, Callable[[Result], str]] = {
        "bytes predicted right": lambda x: f"{x.accuracy:.1%}",
        "in the second half": lambda x: f"{x.late_accuracy:.1%}",
        f"baseline: always {common}": lambda x: f"{x.baseline:.1%}",
        "positions": lambda x: f"{x.positions:,}",
        "heads": lambda x: "1",
        "head size": lambda x: f"{HEAD_DIM}",
        "tiles (Q x KV)": lambda x: f"{x.tiles.q} x {x.tiles.kv}",
        "compile time": lambda x: f"{x.compile_seconds:.2f} s",
        "run time": lambda x: f"{x.run_seconds:.2f} s",
        "speed": lambda x: f"{x.gflops:,.1f} GFLOP/s",
        "temporary memory": lambda x: format_bytes(x.temp_bytes),
        "full score matrix": lambda x: f"{format_bytes(x.score_bytes)}, never built",
        "difference from jax.nn": lambda x: f"{x.difference:.1e} at most",
        "compared": lambda x: f"first {x.compared:,} positions",
    }
    return [(name, *map(cell, results)) for name, cell in rows.items()]


def format_bytes(count: int) -> str:
    """A number of bytes in the largest binary unit that leaves at least 1.

    Example:
        >>> format_bytes(1000), format_bytes(3 * 2**29)
        ('1000 B', '1.5 GiB')
    """
    if count < 1024:
        return f"{count} B"
    exponent = min(4, (count.bit_length() - 1) // 10)
    return f"{count / 1024**exponent:.1f} {'KMGT'[exponent - 1]}iB"


class Character(NamedTuple):
    """One character to show."""

    text: str
    cells: int  # columns of a terminal
    right: bool  # all its bytes were predicted


def last_lines(
    data: np.ndarray, right: np.ndarray, lines: int, columns: int
) -> list[list[Character]]:
    """The last lines that are not blank, character by character, cut to ``columns``."""
    # Lines longer than this are shown from their middle or not at all.
    tail = data[-4 * lines * max(columns, 256) :].tobytes()
    while tail and tail[0] & 0xC0 == 0x80:  # it begins inside a character
        tail = tail[1:]
    # Byte 0 is predicted by nothing.
    hits = np.concatenate([[False], right])[len(data) - len(tail) :]
    found: list[list[Character]] = [[]]
    at = 0
    # The only bytes ignored are those of a character that the end of the data cuts.
    for text in tail.decode("utf-8", "ignore"):
        size = len(text.encode())
        if text == "\n":
            found.append([])
        else:
            found[-1].append(_character(text, bool(hits[at : at + size].all())))
        at += size
    found = [line for line in found if any(character.text != " " for character in line)]
    return [list(_cut(line, columns)) for line in found[-lines:]]


def _character(text: str, right: bool) -> Character:
    # Control characters would move the cursor.
    if not text.isprintable():
        return Character(" ", 1, right)
    if unicodedata.combining(text):
        return Character(text, 0, right)
    return Character(text, 2 if unicodedata.east_asian_width(text) in "WF" else 1, right)


def _cut(line: list[Character], columns: int) -> Iterator[Character]:
    for character in line:
        columns -= character.cells
        if columns < 0:
            return
        yield character


def check_plot(path: str) -> None:
    """Checks that ``save_plot`` can work, before the work it shows.

    Raises:
        InputError: the format is none of ours, matplotlib is missing, or the file can't be written.
    """
    if Path(path).suffix.lower() not in _PLOT_KINDS:
        raise InputError(f"--plot must end in one of {', '.join(_PLOT_KINDS)}; it is {path!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = "--plot needs matplotlib, which is missing: pip install -e '.[plot]'"
        raise InputError(message) from error
    check_writable("--plot", path)


def check_writable(option: str, path: str) -> None:
    """Checks that an option's file can be written, without a trace of the trial.

    Raises:
        InputError: it can't.
    """
    file = Path(path)
    try:
        existed = file.exists()
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{option} must be a writable file; {path!r}: {reason}") from error


def save_plot(result: Result, path: str, name: str) -> None:
    """Saves the accuracy by position, of the text called ``name``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    position = np.arange(1, result.positions + 1)
    total = np.cumsum(result.right)
    window = min(_WINDOW, max(1, result.positions // 8))
    begin = window // 16  # the share of the first few bytes says nothing
    recent = (total[window - 1 :] - np.concatenate([[0], total[:-window]])) / window

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(
        position[window - 1 :],
        recent,
        color="#9ecae1",
        linewidth=1,
        label=f"the last {window:,} bytes",
    )
    axes.plot(
        position[begin:],
        (total / position)[begin:],
        color="#08519c",
        linewidth=2,
        label="all bytes so far",
    )
    axes.axhline(
        result.baseline, color="#737373", linewidth=1.5, linestyle="--", label="most frequent byte"
    )
    # A dollar sign would begin a formula.
    title = "Next-byte prediction by attention alone: " + name.replace("$", r"\$")
    axes.set_title(title, loc="left", fontsize=11, pad=26)
    axes.set_xlabel("position in the text (bytes)")
    axes.set_ylabel("bytes predicted right (%)")
    axes.set_xlim(0, result.positions)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Above the curves, which may run anywhere below.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=3)
    figure.savefig(path)
