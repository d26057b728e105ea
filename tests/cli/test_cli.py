"""The command line as a whole."""

import subprocess
import sys

import pytest

from flash_jax import __version__
from flash_jax.__main__ import main


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"flash_jax {__version__}\n"


def test_no_command_prints_help_and_exits_2(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "demo" in err
    assert "info" in err


def test_an_unknown_command_exits_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["dance"])
    assert exit_.value.code == 2
    assert "dance" in capsys.readouterr().err


def test_the_module_runs_and_the_package_does_not_import_it():
    code = (
        "import sys, flash_jax; print([m for m in sys.modules if m.startswith("
        "('rich.', 'matplotlib.', 'flash_jax._cli', 'flash_jax.__main__'))])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout == "[]\n", loaded.stderr
    command = [sys.executable, "-m", "flash_jax"]
    assert subprocess.run([*command, "--version"], capture_output=True).returncode == 0
    assert subprocess.run([*command, "demo", "missing"], capture_output=True).returncode == 2
