"""One CPU device per core: how a program that divides its work over devices uses all cores.

Within one device XLA divides each operation over the cores, and waits for all of them after each.
Devices go their own way until they exchange something. So where work divides into parts that need
little from each other, such as batch elements and heads, one device per core is faster.
"""

from __future__ import annotations

import contextlib

import jax
from jax.sharding import AxisType, Mesh

from .._checks.numbers import positive_integer
from .._machine.processor import cores_here


def core_mesh(cores: int | None = None, *, axis_name: str = "cores") -> Mesh:
    """Asks JAX for one CPU device per core, and returns the mesh of these devices.

    Call it once at the start of a program, before anything asks JAX for its devices or computes.
    What is then put on the mesh is computed by all cores: ``jit`` divides the work by where its
    arrays lie. It sets ``jax_num_cpu_devices``, which is JAX's own option for that. With several
    processes, after ``jax.distributed.initialize``, the mesh has the devices of all of them.

    Args:
        cores: devices of this process; default: what ``jax_num_cpu_devices`` says already, or else
            as many as there are cores that this process may use.
        axis_name: of the mesh's only axis, whose type is Auto.

    Returns:
        A mesh of CPU devices.

    Raises:
        RuntimeError: JAX has made its devices already, and fewer than that; the message says what
            to do.
        ValueError: cores is not positive.
        TypeError: cores is no integer, or axis_name no string.

    Example:
        >>> mesh = core_mesh(1)
        >>> dict(mesh.shape)
        {'cores': 1}
    """
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be a string; it is {axis_name!r}")
    if cores is None:
        asked = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
        cores = asked if asked > 0 else cores_here()
    cores = positive_integer("cores", cores)
    with contextlib.suppress(RuntimeError):  # its devices are made; there may be enough of them
        jax.config.update("jax_num_cpu_devices", cores)
    found = len(jax.local_devices(backend="cpu"))
    if found < cores:
        raise RuntimeError(
            f"core_mesh must be called before JAX makes its devices, which it does when it first "
            f"computes or is asked for them; it has made {found}, not {cores}. Call core_mesh at "
            f"the start of the program, or set JAX_NUM_CPU_DEVICES={cores} in its environment"
        )
    each = [jax.local_devices(i, backend="cpu")[:cores] for i in range(jax.process_count())]
    devices = [device for own in each for device in own]
    return jax.make_mesh(
        (len(devices),), (axis_name,), axis_types=(AxisType.Auto,), devices=devices
    )
