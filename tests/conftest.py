import jax
import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(20180508)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
