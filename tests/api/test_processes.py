"""Several processes, as on several machines: JAX's own runtime, and gloo between CPUs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_together(count, script, *arguments):
    """What each of so many processes prints; they meet at a free port of this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, script, *(str(x).format(port=port, index=i) for x in arguments)],
            env=os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "-1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:  # one that waits for another that has failed
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [printed for printed, _ in ended]


def test_two_processes_give_what_one_gives():
    """Sharded attention and the ring, with their gradients."""
    script = ROOT / "tests" / "helpers" / "two_processes.py"
    printed = run_together(2, script, "{port}", "{index}")
    assert [x.splitlines()[-1] for x in printed] == ["passed"] * 2


def test_the_example_runs_on_any_number_of_processes():
    script = ROOT / "docs" / "several_processes.py"

    def norms(count):
        options = "--length", 264, "--cores", 1
        first, *_ = run_together(count, script, "127.0.0.1:{port}", count, "{index}", *options)
        *_, devices, last = first.splitlines()
        assert devices.startswith(f"{count} devices of {count} processes")
        return [float(x) for x in last.split(": ")[1].split()]

    alone, together = norms(1), norms(2)
    assert len(alone) == 4
    assert all(abs(x - y) <= 1e-4 * y for x, y in zip(together, alone, strict=True))
