"""The sizes of what a function computes, from its jaxpr: nothing is compiled."""

import jax
from jax.extend import core


def largest_array(function, *arguments):
    """The number of elements of the largest array of a program, operands and constants included."""
    return largest(jax.make_jaxpr(function)(*arguments).jaxpr)


def largest(jaxpr):
    given = [*jaxpr.invars, *jaxpr.constvars]
    made = [x for equation in jaxpr.eqns for x in equation.outvars]
    own = (x.aval.size for x in (*given, *made) if hasattr(x.aval, "size"))
    parameters = (list(equation.params.values()) for equation in jaxpr.eqns)
    inner = (largest(x) for values in parameters for x in jaxprs_in(values))
    return max((*own, *inner), default=0)


def jaxprs_in(x):
    match x:
        case core.ClosedJaxpr():
            yield x.jaxpr
        case core.Jaxpr():
            yield x
        case list() | tuple():
            for y in x:
                yield from jaxprs_in(y)
