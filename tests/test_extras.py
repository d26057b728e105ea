"""Frameworks are optional."""

import importlib
import subprocess
import sys

import pytest


def test_no_framework_is_imported_before_it_is_asked_for():
    code = "import sys, flash_jax; print({'flax', 'equinox', 'haiku', 'keras'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["equinox", "haiku", "keras"])
def test_without_the_framework_the_extra_is_named(name, monkeypatch):
    importlib.import_module(f"flash_jax.{name}")
    monkeypatch.delitem(sys.modules, f"flash_jax.{name}")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install .*\[{name}\]"):
        importlib.import_module(f"flash_jax.{name}")
