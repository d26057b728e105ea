"""What of JAX has changed its name, or may: everything that depends on its version is here.

Tested with 0.10.2 and 0.12.0.
"""

from __future__ import annotations

import jax
from jax import Array


def varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes that x varies over in a ``shard_map``.

    So named since 0.10, the oldest that is supported; earlier releases have ``typeof(x).vma``. JAX
    documents neither.
    """
    return jax.typeof(x).manual_axis_type.varying
