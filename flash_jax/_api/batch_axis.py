"""The batch axis of a call that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array

from .._formats.quantized import QuantizedArray

R = TypeVar("R")


def with_batch_axis(
    attend: Callable[..., R],
    query: Array,
    key: Array | QuantizedArray,
    value: Array | QuantizedArray,
    *others: Any,
) -> R:
    """``attend(query, key, value, *others)``, where the three have a batch axis in any case.

    To (T, N, H), (S, K, H) and (S, K, Hv) one of size 1 is added, and taken off every result.
    """
    if query.ndim == 4:
        return attend(query, key, value, *others)
    query, key, value = jax.tree.map(lambda x: x[None], (query, key, value))
    return jax.tree.map(lambda x: x[0], attend(query, key, value, *others))
