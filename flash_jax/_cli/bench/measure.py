"""All subjects on one case, in alternating rounds, each in a process of its own."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .cases import Case
from .exact import checked_rows, exact_rows, random_inputs
from .processes import Worker, WorkerError
from .subjects import MACHINE, OURS, Entry, best_work

_MACHINE = "the machine"


class Result(NamedTuple):
    """What was measured of one subject on one case."""

    seconds: np.ndarray  # (rounds,), of each round the median
    compile_seconds: float | None
    temporary_bytes: int | None
    error: float  # largest absolute difference from the float64 results, over some rows


class Comparison(NamedTuple):
    """What was measured of all subjects on one case."""

    case: Case
    results: dict[str, Result]
    best: np.ndarray  # (rounds,): FLOP/s of XLA's matrix product, or bytes/s of a sum
    failures: dict[str, str] = {}  # noqa: RUF012  by subject, what went wrong

    @property
    def work(self) -> float:
        """The work that ``best`` counts: operations, or bytes of keys and values."""
        return self.case.nbytes if self.case.bound_by_memory else self.case.flops

    def rate(self, name: str) -> float:
        """Operations or bytes per second: the median over rounds."""
        return float(np.median(self.work / self.results[name].seconds))

    def of_best(self, name: str) -> float:
        """The rate as a share of the machine's best in the same round: the median over rounds."""
        return float(np.median(self.work / self.results[name].seconds / self.best))

    def ratio(self, name: str) -> float:
        """The time as a multiple of flash_jax's in the same round: the median over rounds."""
        return float(np.median(self.results[name].seconds / self.results[OURS].seconds))


def compare(case: Case, rounds: int, subjects: Mapping[str, Entry]) -> Comparison:
    """Measures the subjects that can do the case, and the machine's best, in alternating rounds.

    One worker runs at a time, while all others sleep. A peer that fails is left out, and its
    failure is told; so is that of a wrong result, whose time is kept.

    Raises:
        WorkerError: flash_jax, or the machine's best, fails.
    """
    entries = {name: entry for name, entry in subjects.items() if entry.can(case)}
    rows = checked_rows(case)
    exact = exact_rows(case, rows, random_inputs(case))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        team = _Team(case, Path(folder), stack)
        for name, entry in (entries | {_MACHINE: MACHINE}).items():
            team.add(name, entry)
        seconds = team.rounds(rounds)
        best = best_work(case) / seconds.pop(_MACHINE)
        results = {}
        for name, times in seconds.items():
            error = _error(np.load(team.file(name)), exact)
            results[name] = Result(times, **team.built[name], error=error)
            limit = entries[name].tolerance(case)
            if not error <= limit:  # NaN is wrong, too
                team.failures[name] = f"its result is off by {error:.1e}; allowed is {limit:.0e}"
    return Comparison(case, results, best, team.failures)


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    same = found.shape == exact.shape
    return float(np.max(np.abs(found - exact))) if same else float("inf")


class _Team:
    """The workers of one case."""

    def __init__(self, case: Case, folder: Path, stack: contextlib.ExitStack) -> None:
        self.case, self.folder, self.stack = case, folder, stack
        self.workers: dict[str, Worker] = {}
        self.built: dict[str, dict] = {}
        self.failures: dict[str, str] = {}

    def file(self, name: str) -> Path:
        """The file of a subject's results."""
        return self.folder / f"{name}.npy"

    def add(self, name: str, entry: Entry) -> None:
        """Starts a worker and builds its subject, while the others sleep."""
        with self._told(name):
            worker = Worker(entry, self.folder / f"{name}.log")
            self.stack.callback(worker.close)
            self.built[name] = worker.build(entry, self.case, self.file(name))
            self.workers[name] = worker

    def rounds(self, count: int) -> dict[str, np.ndarray]:
        """Times every worker once a round: (count,) seconds of each that never failed."""
        seconds: dict[str, list[float]] = {name: [] for name in self.workers}
        for _ in range(count):
            for name in [name for name in seconds if name not in self.failures]:
                with self._told(name):
                    seconds[name].append(float(np.median(self.workers[name].round())))
        return {name: np.array(x) for name, x in seconds.items() if name not in self.failures}

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            if name in (OURS, _MACHINE):
                raise WorkerError(f"{name} failed in {self.case.name}: {error}") from error
            self.failures[name] = str(error)
