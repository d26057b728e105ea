"""The processes that the benchmark measures in: how they start, fail, sleep and end."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_bench import SMALL, fake

from flash_jax._cli import commands
from flash_jax._cli.bench import exact, measure, report
from flash_jax._cli.bench.cases import over_devices
from flash_jax._cli.bench.exact import exact_rows, random_inputs
from flash_jax._cli.bench.processes import Worker, WorkerError
from flash_jax._cli.bench.subjects import OURS, SUBJECTS


@pytest.mark.parametrize("name", [OURS, "jax.nn"])
def test_divided_work_gives_the_exact_results(name, tmp_path):
    case, file = over_devices(SMALL["train"], 2), tmp_path / "results.npy"
    with contextlib.closing(Worker(SUBJECTS[name], tmp_path / "log")) as worker:
        worker.build(SUBJECTS[name], case, file)
        assert worker.round()
    exact_ = exact_rows(case, exact.checked_rows(case), random_inputs(case))
    np.testing.assert_allclose(np.load(file), exact_, atol=SUBJECTS[name].tolerance(case))


@pytest.mark.usefixtures("fakes")
def test_what_fails_is_told_and_the_others_are_measured():
    wrong = ("off", "not_a_number", "short")
    peers = {name: fake(name) for name in (*wrong, "refuses", "dies", "dies_later", "talks")}
    found = measure.compare(SMALL["train"], 2, {OURS: fake("right"), **peers})
    assert list(found.results) == [OURS, *wrong, "talks"]
    assert all(result.seconds.shape == (2,) for result in found.results.values())
    assert all((result.seconds > 0).all() for result in found.results.values())
    assert found.results[OURS].error < 1e-6
    assert found.results[OURS].temporary_bytes == 2**20
    assert found.results["off"].error == pytest.approx(0.5)
    last_words = "its process ended with code 3; it last wrote: out of memory"
    assert found.failures == {
        "refuses": "ValueError: no such luck",
        "dies": last_words,
        "dies_later": last_words,
        "off": "its result is off by 5.0e-01; allowed is 1e-04",
        "not_a_number": "its result is off by nan; allowed is 1e-04",
        "short": "its result is off by inf; allowed is 1e-04",
    }
    assert "off failed in train: its result is off by 5.0e-01; allowed is 1e-04" in (
        report.failures([found])
    )


@pytest.mark.usefixtures("fakes")
def test_nothing_is_compared_with_a_flash_jax_that_fails():
    with pytest.raises(WorkerError, match="flash_jax failed in full: ValueError: no such luck"):
        measure.compare(SMALL["full"], 1, {OURS: fake("refuses")})


def test_a_coarse_format_may_be_off_by_more():
    assert fake("off").tolerance(SMALL["full"]) < fake("off").tolerance(SMALL["bf16"])
    assert fake("off", coarse=0.75).tolerance(SMALL["bf16"]) == 0.75


def comes_to(pid, states):
    """Whether a process comes to one of these states of Linux within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "gone"
        if state in states:
            return True
        time.sleep(0.01)
    return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")


@linux
@pytest.mark.usefixtures("fakes")
def test_a_worker_sleeps_unless_it_is_asked(tmp_path):
    with contextlib.closing(Worker(fake("right"), tmp_path / "log")) as worker:
        worker.build(fake("right"), SMALL["full"], tmp_path / "rows.npy")
        for _ in range(2):
            assert comes_to(worker.process.pid, "T")
            assert min(worker.round()) > 0
    assert worker.process.returncode is not None


def run_without_jax(code):
    """What a script prints that has the benchmark's folder as a package ``bench``."""
    start = f"import sys; sys.path.insert(0, {str(Path(commands.__file__).parent)!r})\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    return done.stdout


@linux
def test_a_sleeping_worker_ends_with_its_parent(tmp_path):
    code = f"""
import os, pathlib
from bench import processes, subjects
worker = processes.Worker(subjects.SUBJECTS["PyTorch"], pathlib.Path({str(tmp_path / "log")!r}))
worker.ask({{"versions": []}})
print(worker.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    assert comes_to(int(run_without_jax(code)), ("Z", "X", "gone"))


def test_a_worker_of_a_peer_imports_neither_jax_nor_flash_jax():
    code = (
        "import bench.worker, bench.peers, bench.exact\n"
        "print({x.split('.')[0] for x in sys.modules} & {'bench', 'jax', 'flash_jax'})"
    )
    assert run_without_jax(code) == "{'bench'}\n"
