"""For the tests and the doctests alike."""

import os

import pytest

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """What the user has tuned on this machine changes no test, and no test changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
