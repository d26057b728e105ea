"""The process in which one subject runs one case.

It reads requests from its standard input, one JSON object a line, and answers each on its standard
output, with a line of ``{"ok": ...}`` or ``{"error": "..."}``:

    {"versions": [module, ...]}        {module: version or null, ..., "Python": ...}
    {"build": [module, function], "case": {...}, "file": path}
                                       {"compile_seconds": ..., "temporary_bytes": ...}
    {"round": {}}                      {"seconds": [...]}, one number for each timed run

The checked rows of the results are saved in ``file``. Between requests it waits for a line.

The parent starts a peer's worker with this folder as a package of its own, called ``bench``: that
Python may be another, with neither JAX nor flash_jax.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from . import subjects
from .cases import Case
from .exact import checked_rows, random_inputs

# A round is runs for so long, and at most so many; one, if that takes longer.
_ROUND_SECONDS = 0.2
_MOST_RUNS = 20

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serves standard input and output, until the input or the parent ends."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    serve(sys.stdin, answers)


def _end_with_parent() -> None:
    """Asks Linux for the end of this process when its parent is killed.

    A process that is stopped would never see that its input has ended.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers every request; an error is an answer, too."""
    subject: subjects.Subject | None = None
    for line in requests:
        request = json.loads(line)
        try:
            answer: Any
            if "versions" in request:
                answer = subjects.versions(tuple(request["versions"]))
                answer["Python"] = platform.python_version()
            elif "build" in request:
                module, function = request["build"]
                subject = build(module, function, Case(**request["case"]), request["file"])
                answer = {
                    "compile_seconds": subject.compile_seconds,
                    "temporary_bytes": subject.temporary_bytes,
                }
            else:
                assert subject is not None, "a round comes after a build"
                answer = {"seconds": one_round(subject.run)}
            text = json.dumps({"ok": answer})
        except Exception as error:  # whatever a library raises
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(text, file=answers, flush=True)


def build(module: str, function: str, case: Case, file: str) -> subjects.Subject:
    """Builds a subject, and saves the checked rows of its results: (results, B, rows, N, H)."""
    make = getattr(importlib.import_module(module, __package__), function)
    subject = make(case, random_inputs(case))
    rows = checked_rows(case)
    np.save(file, np.array([x[:, rows] for x in subject.results()], np.float32))
    return subject


def one_round(run: Callable[[], Any]) -> list[float]:
    """Times some runs, after one that doesn't count: it wakes threads, and fills caches."""
    run()
    seconds: list[float] = []
    while len(seconds) < _MOST_RUNS and sum(seconds) < _ROUND_SECONDS:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds
