"""What was measured, shown as a table, as JSON and as a figure."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._machine.processor import machine
from .. import info as _info
from .cases import Case
from .measure import Comparison
from .subjects import OURS

HEADER = (
    "",
    "cores",
    "ms [quartiles]",
    f"x {OURS}",
    "rate",
    "of best",
    "temporaries",
    "compile",
    "max error",
)

_COLORS = {
    OURS: "#08519c",
    "flash_jax int8": "#6baed6",
    "jax.nn": "#969696",
    "PyTorch": "#e6550d",
    "ONNX Runtime": "#31a354",
    "OpenVINO": "#756bb1",
    "OpenVINO bf16": "#bcbddc",
}


def environment(peers: Mapping[str, str]) -> dict[str, str]:
    """Lists the versions, the processor and the settings that the numbers hold for.

    ``peers`` are the versions of ``available``.
    """
    return dict(
        [
            *_info.versions(),
            *peers.items(),
            *_info.hardware(),
            ("XLA_FLAGS", os.environ.get("XLA_FLAGS", "")),
            ("date", datetime.datetime.now().astimezone().date().isoformat()),
        ]
    )


def title(case: Case) -> str:
    """Writes the title of a case's table."""
    over = ""
    if case.devices > 1 and case.divided is not None:
        parts = zip(("batch", "heads", "queries"), case.divided, strict=True)
        over = f", {case.devices} devices: " + ", ".join(f"{x} / {n}" for x, n in parts if n > 1)
    return f"{case.name}: {case.why}; {case.shape}, {case.dtype}{over}"


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Makes the rows of a case's table, one for each subject, with the columns of ``HEADER``."""
    unit = "GB/s" if comparison.case.bound_by_memory else "GFLOP/s"
    table = []
    for name, result in comparison.results.items():
        low, median, high = np.percentile(result.seconds, [25, 50, 75]) * 1e3
        memory, compiling = result.temporary_bytes, result.compile_seconds
        table.append(
            (
                name,
                str(machine().cores),
                f"{median:.2f} [{low:.2f}, {high:.2f}]",
                f"{comparison.ratio(name):.2f}",
                f"{comparison.rate(name) / 1e9:.0f} {unit}",
                f"{comparison.of_best(name):.2f}",
                "" if memory is None else f"{memory / 2**20:.1f} MiB",
                "" if compiling is None else f"{compiling:.2f} s",
                f"{result.error:.1e}",
            )
        )
    return table


def failures(comparisons: Sequence[Comparison]) -> list[str]:
    """Writes what failed, one line for each subject and case."""
    return [
        f"{name} failed in {x.case.name}: {text}"
        for x in comparisons
        for name, text in x.failures.items()
    ]


def as_json(comparisons: Sequence[Comparison], measured_on: Mapping[str, str]) -> str:
    """Writes everything measured, every round included, as JSON."""
    return json.dumps(
        {
            "environment": measured_on,
            "cases": [
                {
                    "name": x.case.name,
                    "why": x.case.why,
                    "shape": x.case.shape,
                    "dtype": x.case.dtype,
                    "cores": machine().cores,
                    "devices": x.case.devices,
                    "bound_by_memory": x.case.bound_by_memory,
                    "best": float(np.median(x.best)),
                    "subjects": {name: _entry(x, name) for name in x.results},
                    "failures": x.failures,
                }
                for x in comparisons
            ],
        },
        indent=1,
    )


def _entry(comparison: Comparison, name: str) -> dict[str, Any]:
    result = comparison.results[name]
    return {
        "seconds": result.seconds.tolist(),
        f"ratio to {OURS}": comparison.ratio(name),
        "rate": comparison.rate(name),
        "of best": comparison.of_best(name),
        "temporary_bytes": result.temporary_bytes,
        "compile_seconds": result.compile_seconds,
        "max_error": result.error,
    }


def save_plot(comparisons: Sequence[Comparison], curve: Sequence[Comparison], path: str) -> None:
    """Saves a figure: bars of the time relative to flash_jax, and the rate over the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.55 * len(comparisons)), dpi=150, layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_bars(bars, comparisons)
    _draw_curve(lines, curve)
    handles = {label: handle for axes in (bars, lines) for handle, label in _legend(axes)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    figure.savefig(Path(path))


def _legend(axes: Any) -> zip:
    return zip(*axes.get_legend_handles_labels(), strict=True)


def _draw_bars(axes: Any, comparisons: Sequence[Comparison]) -> None:
    """Draws a group of bars for each case, and in it one bar for each subject."""
    height = 0.8 / max(len(x.results) for x in comparisons)
    for i, comparison in enumerate(comparisons):
        for j, name in enumerate(comparison.results):
            ratio = comparison.ratio(name)
            at = i + (j - (len(comparison.results) - 1) / 2) * height
            label = name if axes.get_legend_handles_labels()[1].count(name) == 0 else None
            axes.barh(at, ratio, height, color=_COLORS[name], label=label)
            axes.text(ratio, at, f" {ratio:.2f}", va="center", fontsize=5)
    axes.axvline(1, color="#252525", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(comparisons)), [x.case.name for x in comparisons])
    axes.invert_yaxis()
    axes.set_xlabel(f"time, as a multiple of {OURS}'s (less is faster)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Any, curve: Sequence[Comparison]) -> None:
    """Draws GFLOP/s over the length, one line for each subject."""
    names = dict.fromkeys(name for x in curve for name in x.results)
    for name in names:
        points = [(x.case.T, x.rate(name) / 1e9) for x in curve if name in x.results]
        axes.plot(*zip(*points, strict=True), marker="o", color=_COLORS[name], label=name)
    axes.plot(
        [x.case.T for x in curve],
        [np.median(x.best) / 1e9 for x in curve],
        color="#252525",
        linestyle="--",
        label="XLA's matrix product",
    )
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xticks([x.case.T for x in curve], [f"{x.case.T:,}" for x in curve])
    axes.set_xlabel(f"length T = S of 8 heads of size 64, {curve[0].case.dtype}")
    axes.set_ylabel("GFLOP/s")
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
