"""How much resident memory a compiled call takes while it runs, beside what it was given.

Run as a program, since the peak is that of a process: ``python resident.py T S H dtype derivative``
prints the bytes, and those that XLA planned for temporaries and results.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax import numpy as jnp

from flash_jax import flash_attention

_STATUS = Path("/proc/self/status")


def _bytes(field):
    (line,) = (x for x in _STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(T, S, H, dtype, derivative):
    x = [jnp.ones((1, n, 1, H), dtype) for n in (T, S, S)]
    call = flash_attention
    if derivative:
        call = jax.grad(lambda *x: jnp.sum(flash_attention(*x).astype(np.float32)), (0, 1, 2))
    compiled = jax.jit(call).lower(*x).compile()
    jax.block_until_ready(x)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = _bytes("VmRSS")
    jax.block_until_ready(compiled(*x))
    planned = compiled.memory_analysis()
    return _bytes("VmHWM") - before, planned.temp_size_in_bytes + planned.output_size_in_bytes


if __name__ == "__main__":
    T, S, H, dtype, derivative = sys.argv[1:]
    print(*measure(int(T), int(S), int(H), dtype, derivative == "True"))
