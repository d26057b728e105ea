"""Alternating rounds in one process, and what the machine could do at best."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import numpy as jnp

from .cases import Case
from .subjects import OURS, SUBJECTS, random_inputs

Name = TypeVar("Name")

_CHECKED_ROWS = 64
_MATMUL = 2048
_MACHINE = "the machine"


class Result(NamedTuple):
    """One subject on one case."""

    seconds: np.ndarray  # of every round
    compile_seconds: float | None
    temporary_bytes: int | None
    error: float  # largest absolute difference from float64, over some rows


class Comparison(NamedTuple):
    """All subjects on one case."""

    case: Case
    results: dict[str, Result]
    best: np.ndarray  # of every round: FLOP/s of XLA's matrix product, or bytes/s of a sum

    @property
    def work(self) -> float:
        """What ``best`` counts: operations, or bytes of keys and values."""
        return self.case.nbytes if self.case.bound_by_memory else self.case.flops

    def rate(self, name: str) -> float:
        """Operations or bytes per second."""
        return float(np.median(self.work / self.results[name].seconds))

    def of_best(self, name: str) -> float:
        """The rate, as a share of the machine's best of the same rounds."""
        return float(np.median(self.work / self.results[name].seconds / self.best))

    def ratio(self, name: str) -> float:
        """How many times as long as flash_jax it takes: the median over rounds."""
        return float(np.median(self.results[name].seconds / self.results[OURS].seconds))


def compare(case: Case, rounds: int, names: Sequence[str] = tuple(SUBJECTS)) -> Comparison:
    """Runs the subjects that do the case in alternation, after two runs of each that do not count.

    Ratios are taken within rounds: noise of the machine hits both sides of a round alike.
    """
    inputs = random_inputs(case)
    found = {name: SUBJECTS[name](case, inputs) for name in names}
    subjects = {name: subject for name, subject in found.items() if subject is not None}
    rows = _checked_rows(case)
    exact = exact_rows(case, rows, *inputs)
    runs = {name: subject.run for name, subject in subjects.items()}
    run, work = _best_of_machine(case)
    seconds = alternate(runs | {_MACHINE: run}, rounds)
    results = {
        name: Result(
            seconds[name],
            subject.compile_seconds,
            subject.temporary_bytes,
            float(np.max(np.abs(subject.output()[:, rows] - exact))),
        )
        for name, subject in subjects.items()
    }
    return Comparison(case, results, work / seconds[_MACHINE])


def compare_alone(case: Case, rounds: int) -> Comparison:
    """``compare`` in a process of its own: what one case leaves behind slows down the next."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(compare, case, rounds).result()


def alternate(runs: dict[Name, Callable[[], object]], rounds: int) -> dict[Name, np.ndarray]:
    """Seconds of every run in every round, after two warm-ups."""
    for run in (*runs.values(), *runs.values()):
        run()
    seconds = {name: np.empty(rounds) for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name][i] = time.perf_counter() - start
    return seconds


def _best_of_machine(case: Case) -> tuple[Callable[[], object], float]:
    """A run that does nothing but what bounds the case, and how much of that."""
    if case.bound_by_memory:
        x = jnp.ones((case.nbytes // 4,), np.float32)
        total = jax.jit(jnp.sum)
        return lambda: total(x).block_until_ready(), case.nbytes
    x = jnp.asarray(np.random.default_rng(0).standard_normal((_MATMUL, _MATMUL)), np.float32)
    product = jax.jit(jnp.matmul)
    return lambda: product(x, x).block_until_ready(), 2.0 * _MATMUL**3


def _checked_rows(case: Case) -> np.ndarray:
    limit = int(np.min(case.options.get("query_seq_lengths", case.T)))
    return np.unique(np.linspace(0, limit - 1, _CHECKED_ROWS).astype(int))


def exact_rows(case: Case, rows: np.ndarray, q: Any, k: Any, v: Any) -> np.ndarray:
    """Some rows of the float64 result, (B, rows, N, H)."""
    q, k, v = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (q, k, v))
    k, v = (np.repeat(x, case.N // case.K, axis=1) for x in (k, v))
    s = q[:, :, rows] @ np.swapaxes(k, -1, -2) / np.sqrt(case.H)
    t, keys = rows[:, None], np.arange(case.S)
    keep = (keys <= t) if case.is_causal else np.ones((len(rows), case.S), bool)
    if "local_window_size" in case.options:
        keep = keep & (keys >= t - case.options["local_window_size"][0])
    if "query_segment_ids" in case.options:
        ids = case.options["query_segment_ids"][0]
        keep = keep & (ids[rows][:, None] == ids)
    if "key_value_seq_lengths" in case.options:
        lengths = case.options["key_value_seq_lengths"]
        keep = keep & (keys < lengths[:, None, None, None])
    s = np.where(keep, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.swapaxes(p @ v / p.sum(-1, keepdims=True), 1, 2)
