"""Fixtures of the tests of the command line; a plugin, which the root conftest names."""

import builtins
from pathlib import Path

import pytest
from small_bench import fake
from texts import TEXT

from flash_jax._cli import demo
from flash_jax._cli.bench import measure


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return str(path)


@pytest.fixture
def no_module(monkeypatch):
    """Makes the import of a module, and of all in it, fail."""

    def remove(name):
        real = builtins.__import__

        def fake(module, *args, **kwargs):
            if module.split(".")[0] == name:
                raise ImportError(f"No module named {module!r}")
            return real(module, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)

    return remove


@pytest.fixture
def no_run(monkeypatch):
    """Fails if the long computation begins."""

    def fail(*_):
        raise AssertionError("computed before the options were checked")

    monkeypatch.setattr(demo, "measure", fail)


@pytest.fixture
def fakes(monkeypatch):
    """Workers find the fake subjects; what bounds a case is one of them, too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(measure, "MACHINE", fake("right"))
