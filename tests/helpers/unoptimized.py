"""Programs that LLVM does not optimize, which would take most of the time.

For tests of formulas: bits, and what must hold of the program that users get, need the others.
"""

import jax

ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # of a process, for all of its programs
UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def run(function, *arguments):
    """A function's results, compiled so."""
    compiled = jax.jit(function).lower(*arguments).compile(compiler_options=UNOPTIMIZED)
    return compiled(*arguments)
