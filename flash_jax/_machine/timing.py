"""Time measured on this machine: several functions in alternating rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

Name = TypeVar("Name")


def alternate(runs: dict[Name, Callable[[], object]], rounds: int) -> dict[Name, np.ndarray]:
    """Times every run once a round, after two runs of each that do not count.

    Noise of the machine hits all runs of a round alike, so ratios are best taken within rounds.

    Args:
        runs: by name, functions that return when their work is done.
        rounds: number of rounds.

    Returns:
        (rounds,) float64 seconds for each name.
    """
    for run in (*runs.values(), *runs.values()):
        run()
    seconds = {name: np.empty(rounds) for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name][i] = time.perf_counter() - start
    return seconds
