"""Starts workers, talks to them, and puts them to sleep.

Idle threads of PyTorch, ONNX Runtime and XLA spin: they wait for work in a loop, which takes cores
from whoever is measured next. Settings that forbid it would also change how fast these libraries
are. So a worker that isn't asked anything is stopped as a whole (SIGSTOP), where the system can.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from .cases import Case
from .subjects import Entry

_HERE, _PACKAGE = Path(__file__).parent, __name__.rpartition(".")[0]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import {package}; del sys.path[0]; "
    "from {package}.worker import main; main()"
)
_CAN_STOP = hasattr(signal, "SIGSTOP")
_SPINNING_SECONDS = 0.5  # OpenMP's threads spin for 0.2 s
_ENDING_SECONDS = 10


class WorkerError(Exception):
    """A worker could not do what it was asked; the message says why, in one line."""


class Worker:
    """A process with one subject. It sleeps whenever it isn't asked.

    Args:
        entry: the subject.
        log: a file for what the process writes beside its answers.

    Raises:
        WorkerError: the process can't be started.
    """

    def __init__(self, entry: Entry, log: Path) -> None:
        package = "bench" if entry.needs else _PACKAGE
        root = _HERE.parents[package.count(".")]
        command = [entry.python, "-c", _START.format(package=package), str(root)]
        self._log = log
        try:
            with log.open("wb") as stderr:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
                )
        except OSError as error:
            raise WorkerError(error.strerror or str(error)) from error

    def ask(self, request: dict[str, Any]) -> Any:
        """Wakes the worker, sends a request, waits for the answer, and lets it sleep.

        Raises:
            WorkerError: the worker answers with an error, or has died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended: then no answer comes
            self._wake()
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        self._sleep()
        try:
            answer = json.loads(line)
        except ValueError as error:  # a program that is no worker
            raise WorkerError(f"it answers {line.decode(errors='replace').strip()!r}") from error
        if "error" in answer:
            raise WorkerError(" ".join(answer["error"].split()))
        return answer["ok"]

    def build(self, entry: Entry, case: Case, file: Path) -> dict[str, Any]:
        """Builds the subject of a case, and saves the checked rows of its results in a file."""
        names = [entry.module, entry.function]
        return self.ask({"build": names, "case": case._asdict(), "file": str(file)})

    def round(self) -> list[float]:
        """Times one round: seconds of every run that counts."""
        return self.ask({"round": {}})["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what could not be sent is not missed
                pipe.close()

    def _wake(self) -> None:
        if _CAN_STOP:
            self.process.send_signal(signal.SIGCONT)

    def _sleep(self) -> None:
        if _CAN_STOP:
            self.process.send_signal(signal.SIGSTOP)
        else:
            time.sleep(_SPINNING_SECONDS)

    def _last_words(self) -> str:
        try:
            code = self.process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return "its process no longer answers"
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return f"its process ended with code {code}; it last wrote: {last}"
