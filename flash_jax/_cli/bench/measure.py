"""All subjects on one case, in alternating rounds, and what the machine could do at best."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from ..._machine.timing import alternate
from .cases import Case
from .subjects import OURS, SUBJECTS, random_inputs

_CHECKED_ROWS = 64
_MATMUL = 2048
_MACHINE = "the machine"


class Result(NamedTuple):
    """What was measured of one subject on one case."""

    seconds: np.ndarray  # (rounds,)
    compile_seconds: float | None
    temporary_bytes: int | None
    error: float  # largest absolute difference from the float64 result, over some rows


class Comparison(NamedTuple):
    """What was measured of all subjects on one case."""

    case: Case
    results: dict[str, Result]
    best: np.ndarray  # (rounds,): FLOP/s of XLA's matrix product, or bytes/s of a sum

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


def compare(case: Case, rounds: int, names: Sequence[str] = tuple(SUBJECTS)) -> Comparison:
    """Measures the subjects that can do the case, and the machine's best, in alternating rounds."""
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
    """Calls ``compare`` in a process of its own, since what a case leaves behind slows the next."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(compare, case, rounds).result()


def _best_of_machine(case: Case) -> tuple[Callable[[], object], float]:
    """Makes a run that does only what bounds the case, and counts its operations or bytes."""
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
    """Computes some rows of the result in float64 NumPy, (B, rows, N, H)."""
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
