"""Frameworks are optional."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

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
    with pytest.raises(ImportError, match=rf"pip install -e '\.\[{name}\]'"):
        importlib.import_module(f"flash_jax.{name}")


def test_nothing_tells_to_install_a_package_of_this_name():
    """It is not published: whoever takes the name would be trusted by our own words."""
    root = Path(__file__).parents[2]
    patterns = "*.md", "docs/*.md", "flash_jax/**/*.py", "notebooks/*.py", "notebooks/*.ipynb"
    files = [path for pattern in patterns for path in root.glob(pattern)]
    assert root / "README.md" in files
    by_name = re.compile(r"install( +-\S+)* +[\\'\"]*flash[-_]jax")
    assert by_name.search("pip install -q 'flash-jax[flax]'")
    for path in files:
        assert not by_name.search(path.read_text()), path
