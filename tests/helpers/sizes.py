"""The sizes of what a function computes, from its jaxpr: nothing is compiled."""

import jax
from jax.extend import core


def largest_array(function, *arguments):
    """The number of elements of the largest array in a function's program, operands included."""
    return largest(jax.make_jaxpr(function)(*arguments).jaxpr)


def largest(jaxpr):
    own = (atom.aval.size for e in jaxpr.eqns for atom in e.outvars if hasattr(atom.aval, "size"))
    inner = (largest(x) for e in jaxpr.eqns for x in jaxprs_in(list(e.params.values())))
    return max(*own, *inner, *(x.aval.size for x in jaxpr.invars), 0, 0)


def jaxprs_in(x):
    match x:
        case core.ClosedJaxpr():
            yield x.jaxpr
        case core.Jaxpr():
            yield x
        case list() | tuple():
            for y in x:
                yield from jaxprs_in(y)
