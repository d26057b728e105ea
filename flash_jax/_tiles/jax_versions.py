"""All that depends on JAX's version: what has no public name there, or has changed its name.

Tested with 0.10.2 and 0.12.0.
"""

from __future__ import annotations

import functools

import jax
import jaxlib.version
from jax import Array
from jax.extend.core import Primitive

try:
    from jax._src import checkify
except ImportError:  # should JAX move it, attention works on without these reports
    checkify = None

try:
    from jax._src import xla_bridge
except ImportError:  # should JAX move it, tiles are those of a single device
    xla_bridge = None

# Whether XLA makes one kernel of a tile. 0.10 does, too, but a slow one.
ONE_KERNEL = jaxlib.version.__version_info__ >= (0, 11)


def cpu_devices() -> int:
    """How many CPU devices JAX has here; 1 where it has none, or none yet.

    JAX's devices must not be made by asking for them: their number may still be set.
    """
    if xla_bridge is None or not xla_bridge.backends_are_initialized():
        return 1
    try:
        return len(jax.local_devices(backend="cpu"))
    except RuntimeError:  # JAX_PLATFORMS names others only
        return 1


def varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes that x varies over in a ``shard_map``.

    So named since 0.10, the oldest that is supported; earlier releases have ``typeof(x).vma``. JAX
    documents neither.
    """
    return jax.typeof(x).manual_axis_type.varying


def report_nan(primitive: Primitive) -> None:
    """Has ``jax.experimental.checkify`` report NaN in the primitive's results.

    There is no public way to add a primitive to its checks (0.10 to 0.12).
    """
    if checkify is not None:
        rule = functools.partial(checkify.nan_error_check, primitive)
        checkify.error_checks[primitive] = rule
