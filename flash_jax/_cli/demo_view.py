"""What the demonstration shows: its table, the last lines of the text, and a figure."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .demo import HEAD_DIM, Result

_WINDOW = 2048  # positions that the lighter curve averages


def report(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Makes the rows of the table: a name, then one cell for each result."""
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
    """Writes a number of bytes in the largest binary unit that leaves at least 1.

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
    cells: int  # columns that it takes on a terminal
    right: bool  # whether all its bytes were predicted


def last_lines(
    data: np.ndarray, right: np.ndarray, lines: int, columns: int
) -> list[list[Character]]:
    """Finds the last lines that are not blank, as characters, and cuts them to ``columns``.

    Args:
        data: (n,) uint8, the text.
        right: (n - 1,) bool; entry i tells whether byte i + 1 was predicted.
        lines: lines to find at most.
        columns: columns of the terminal.
    """
    # Where lines are longer than this allows for, the first ones are cut or left out.
    tail = data[-4 * lines * max(columns, 256) :].tobytes()
    while tail and tail[0] & 0xC0 == 0x80:  # the tail begins inside a character
        tail = tail[1:]
    # Nothing predicts byte 0.
    hits = np.concatenate([[False], right])[len(data) - len(tail) :]
    found: list[list[Character]] = [[]]
    at = 0
    # Only a character that the end of the data cuts is ignored.
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


def save_plot(result: Result, path: str, name: str) -> None:
    """Saves a figure of the accuracy by position; its title says the text's ``name``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    position = np.arange(1, result.positions + 1)
    total = np.cumsum(result.right)
    window = min(_WINDOW, max(1, result.positions // 8))
    begin = window // 16  # the first few bytes say nothing about the share
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
    # Matplotlib takes a dollar sign for the beginning of a formula.
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
    # The legend stands above the axes, since the curves may run anywhere inside.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=3)
    figure.savefig(path)
