"""Several processes, as on several machines: JAX's own runtime, and gloo between CPUs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from oracle import numpy_attention

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


def test_the_example_runs_and_its_output_is_that_of_the_formula():
    script = ROOT / "docs" / "several_processes.py"
    options = "--length", 264, "--cores", 1
    first, _ = run_together(2, script, "127.0.0.1:{port}", 2, "{index}", *options)
    *_, devices, last = first.splitlines()
    assert devices.startswith("2 devices of 2 processes")
    norm, *gradients = (float(x) for x in last.split(": ")[1].split())
    positions, wave = np.arange(264)[:, None, None], np.arange(1, 513).reshape(8, 64)
    x = np.moveaxis(np.sin(positions * wave / 1024 + positions), 1, 0)
    exact, _ = numpy_attention(x, x, x, is_causal=True)
    assert abs(norm - np.linalg.norm(exact)) < 1e-4 * norm
    assert len(gradients) == 3
    assert min(gradients) > 0
