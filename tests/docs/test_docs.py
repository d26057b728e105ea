"""What the documentation promises: every public name is explained, and shown in use by a doctest.

The doctests themselves run with the tests of the package.
"""

import doctest
import importlib.metadata
import inspect
from pathlib import Path

import pytest

import flash_jax

NAMES = [
    name
    for name, x in vars(flash_jax).items()
    if not name.startswith("_") and not inspect.ismodule(x)
]
# How masks answer the kernels, in terms of a QueryTile, which is not public.
OF_THE_KERNELS = {"array_axes", "bind", "keep", "listed", "padded", "read_keys", "tiles"}


def routines(name):
    """A function; a class and its own public methods, class methods included."""
    x = getattr(flash_jax, name)
    yield x
    if inspect.isclass(x):
        own = (key for key in vars(x) if not key.startswith("_") and key not in OF_THE_KERNELS)
        yield from (getattr(x, key) for key in own if inspect.isroutine(getattr(x, key)))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_doctest(name):
    for x in routines(name):
        assert doctest.DocTestParser().get_examples(inspect.getdoc(x) or ""), x.__qualname__


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_in_the_reference(name):
    reference = Path(__file__).parents[2] / "docs" / "api.md"
    listed = [line.split(":: ")[-1] for line in reference.read_text().splitlines() if ":: " in line]
    assert listed.count(name) == 1


def test_the_installed_version_is_the_imported_one():
    assert importlib.metadata.version("flash-jax") == flash_jax.__version__
