"""Calls of attention, and arrays for those that are refused."""

import contextlib
import re

import jax
import numpy as np
import pytest

from flash_jax import flash_attention, flash_attention_with_lse


@contextlib.contextmanager
def refused(error, message):
    """An error whose text begins with our sentence, which begins with the argument's name."""
    with pytest.raises(error) as caught:
        yield
    assert re.match(message, str(caught.value)), str(caught.value)


# Sizes are distinct, so that no array fits by accident.

B, T, S, N, NK, H = 2, 5, 7, 6, 3, 4
QUERY = np.ones((B, T, N, H), np.float32)
KEY = np.ones((B, S, NK, H), np.float32)
VALUE = np.ones((B, S, NK, 2), np.float32)
RNG = jax.random.key(0)


def f32(*shape):
    return np.ones(shape, np.float32)


def i32(*shape):
    return np.ones(shape, np.int32)


def attend(query=QUERY, key=KEY, value=VALUE, **options):
    return flash_attention_with_lse(query, key, value, **options)


def unbatched(**options):
    return flash_attention(QUERY[0], KEY[0], VALUE[0], **options)


def name_options(case):
    return "-".join(case) if isinstance(case, dict) else None
