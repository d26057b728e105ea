"""Tests that need a process of their own: other devices, another environment."""

import os
import subprocess
import sys
from pathlib import Path


def run_script(name, *arguments, devices=1, **environment):
    """What a script of this folder prints, run in a process of its own on so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-W", "error", Path(__file__).with_name(name), *arguments],
        env=os.environ | {"XLA_FLAGS": flags} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
