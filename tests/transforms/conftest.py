import numpy as np
import pytest
from batched import B, H, K, N, S, T
from oracle import random_qkv


@pytest.fixture
def model_qkv(rng):
    return tuple(
        np.swapaxes(x, 1, 2) for x in random_qkv(rng, lead=(B,), N=N, K=K, T=T, S=S, H=H, Hv=3)
    )
