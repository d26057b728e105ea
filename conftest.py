"""For the tests and the doctests alike."""

import os

import garbage
import jax
import pytest

pytest_plugins = ["command_line"]
os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported


def pytest_configure(config):
    """A program is compiled once, for all processes and for the next run.

    Most of the tests' time is the compiler's. ``--cache-clear`` forgets the programs.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or config.cache.mkdir("jax-programs")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)  # for the processes that tests start
        jax.config.update(name, value)


def pytest_collection_finish():
    """Else the collection of garbage takes a few percent of the time."""
    garbage.collect_seldom()


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """What the user has tuned on this machine changes no test, and no test changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
