"""What is not in JAX's public interface, or differs between its versions: each with the reason."""

from __future__ import annotations

import functools

from jax.extend.core import Primitive

try:
    from jax._src import checkify
except ImportError:  # should JAX move it, attention works on without these reports
    checkify = None


def report_nan(primitive: Primitive) -> None:
    """Has ``jax.experimental.checkify`` report NaN in the primitive's results.

    There is no public way to add a primitive to its checks (jax 0.10 to 0.12).
    """
    if checkify is not None:
        rule = functools.partial(checkify.nan_error_check, primitive)
        checkify.error_checks[primitive] = rule
