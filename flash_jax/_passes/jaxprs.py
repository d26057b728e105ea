"""Jaxprs as values: when two are the same, and what one kernel of XLA may hold of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params  # pyright: ignore
from jax.sharding import AbstractMesh, Sharding, use_abstract_mesh

# What XLA's library has, elementwise, of one dtype of floats (``kernel``). Not max and min: of a
# NaN and a number its maximum may be the number (0.12), and a NaN must not be lost.
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "neg", "abs", "floor", "ceil"),
    *("exp", "expm1", "log", "log1p", "tanh", "logistic", "erf", "sqrt", "rsqrt", "pow"),
    *("integer_pow", "square", "copy", "add_any"),
}
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
_CALLS |= {"custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}


def identity(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """A value that is equal for jaxprs that compute the same, and the functions that it is not of.

    Variables are numbered in the order of their appearance. Functions among the parameters of an
    operation, such as rules for derivatives, are equal to themselves only, and are listed apart.
    """
    opaque: list[Any] = []

    def of_jaxpr(jaxpr: Any) -> Any:
        numbers: dict[Any, int] = {}

        def of_variable(x: Any) -> Any:
            if isinstance(x, Literal):
                return x.aval, np.asarray(x.val).tobytes()
            return numbers.setdefault(x, len(numbers)), x.aval

        def of_equation(eqn: Any) -> Any:
            names = tuple(map(of_variable, eqn.invars)), tuple(map(of_variable, eqn.outvars))
            return eqn.primitive, of_value(eqn.params), names

        first = tuple(map(of_variable, inputs(jaxpr)))
        steps = tuple(map(of_equation, jaxpr.eqns))
        return first, steps, tuple(map(of_variable, jaxpr.outvars))

    def of_value(x: Any) -> Any:
        if isinstance(x, ClosedJaxpr):
            return of_jaxpr(x.jaxpr), of_value(tuple(x.consts))
        if isinstance(x, Jaxpr):
            return of_jaxpr(x)
        if isinstance(x, dict):
            return tuple((name, of_value(x[name])) for name in sorted(x, key=str))
        if isinstance(x, list | tuple):
            return type(x), tuple(map(of_value, x))
        if isinstance(x, np.ndarray | Array) and not isinstance(x, Tracer):
            return x.shape, x.dtype, np.asarray(x).tobytes()
        try:
            plain = isinstance(x, type) or not (callable(x) or hasattr(x, "call_wrapped"))
            return (type(x), hash(x), x) if plain else _apart(x)
        except TypeError:  # no hash
            return _apart(x)

    def _apart(x: Any) -> str:
        opaque.append(_Itself(x))
        return "opaque"

    return of_jaxpr(jaxpr), tuple(opaque)


class _Itself:
    """Equal to nothing but what holds the same object."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.x is other.x


def inputs(jaxpr: Any) -> list[Any]:
    """All variables that a jaxpr is given: those of its constants first."""
    return [*jaxpr.constvars, *jaxpr.invars]


def without_constants(jaxpr: Any) -> Any:
    """A jaxpr of the constants and the arguments: it holds no array, nor a tracer."""
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return Jaxpr([], inputs(jaxpr), jaxpr.outvars, jaxpr.eqns, jaxpr.effects, info)


def one_kernel(jaxpr: Any, score: int) -> bool:
    """Whether argument ``score``, a float, goes through operations that one kernel may hold.

    What does not depend on it is computed beforehand, and may be anything.
    """
    return _fuses(jaxpr, [i == score for i in range(len(jaxpr.invars))]) is not None


def _fuses(jaxpr: Any, given: list[bool]) -> list[bool] | None:
    """Which results depend on the inputs that are marked; None: some operation is refused."""
    known = dict(zip(inputs(jaxpr), given, strict=True))
    for eqn in jaxpr.eqns:
        depend = [not isinstance(x, Literal) and known[x] for x in eqn.invars]
        results = [any(depend)] * len(eqn.outvars)
        if any(depend):
            name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
            if name in _CALLS:
                inner = _inner(eqn)
                results = _fuses(inner.jaxpr, [False] * len(inner.consts) + depend)
                if results is None:
                    return None
            elif name == "select_n":
                if depend[0] or len(depend) != 3:
                    return None
            elif name == "convert_element_type":
                if eqn.invars[0].aval.dtype != dtype:
                    return None
            elif name not in _ELEMENTWISE:
                return None
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [not isinstance(x, Literal) and known[x] for x in jaxpr.outvars]


def as_one_kernel(jaxpr: Any, score: int, arguments: list[Any]) -> list[Any]:
    """The results of a jaxpr that is ``one_kernel``, its selects as sums and products.

    XLA's library has no select. With a condition c that is known before the score,

        where(c, x, y) = c x + where(c, 0, y)

    for a finite x; for another it is NaN where c is false, which the kernel's caller finds.
    """
    results = _evaluated(jaxpr, [(x, i == score) for i, x in enumerate(arguments)])
    return [x for x, _ in results]


def _evaluated(jaxpr: Any, given: list[tuple[Any, bool]]) -> list[tuple[Any, bool]]:
    """Results, and whether they depend on the score; alike the inputs."""
    known = dict(zip(inputs(jaxpr), given, strict=True))
    read = lambda x: (x.val, False) if isinstance(x, Literal) else known[x]  # noqa: E731
    for eqn in jaxpr.eqns:
        pairs = [read(x) for x in eqn.invars]
        xs, depend = [x for x, _ in pairs], [moves for _, moves in pairs]
        if eqn.primitive.name in _CALLS:
            inner = _inner(eqn)
            results = _evaluated(inner.jaxpr, [*((x, False) for x in inner.consts), *pairs])
        else:
            if any(depend) and eqn.primitive.name == "select_n":
                found = [_select(*xs, *depend[1:])]
            else:
                found = eqn.primitive.bind(*xs, **eqn.params)
                found = found if eqn.primitive.multiple_results else [found]
            results = [(x, any(depend)) for x in found]
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _select(condition: Any, no: Any, yes: Any, no_moves: bool, yes_moves: bool) -> Array:
    """``where(condition, yes, no)`` of a condition that does not depend on the score."""
    chosen = jnp.asarray(condition).astype(jnp.result_type(no))
    no = no * (1 - chosen) if no_moves else jnp.where(condition, jnp.zeros_like(no), no)
    yes = yes * chosen if yes_moves else jnp.where(condition, yes, jnp.zeros_like(yes))
    return yes + no


def _inner(eqn: Any) -> ClosedJaxpr:
    inner = eqn.params[_CALLS[eqn.primitive.name]]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, [])


def without_mesh(name: str, jaxpr: Any) -> Any:
    """The jaxpr without the Explicit axes of a mesh, which types and parameters tell of.

    Raises:
        NotImplementedError: an operation has parts of its own that tell of them.
    """
    variables = [*jaxpr.invars, *(x for eqn in jaxpr.eqns for x in eqn.outvars)]
    if not any(x.aval.sharding.mesh.explicit_axes for x in variables):
        return jaxpr
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in jaxpr.invars]
    with use_abstract_mesh(AbstractMesh((), ())):
        new = jax.make_jaxpr(lambda *given: _plain(name, jaxpr, list(given)))(*shapes)
    return without_constants(new.jaxpr)


def _plain(name: str, jaxpr: Any, given: list[Any]) -> list[Any]:
    known = dict(zip(inputs(jaxpr), given, strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else known[x]  # noqa: E731
    for eqn in jaxpr.eqns:
        xs = [read(x) for x in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            inner = _inner(eqn)
            found = _plain(name, inner.jaxpr, [*inner.consts, *xs])
        elif list(jaxprs_in_params(eqn.params)) or "sharding_constraint" in eqn.primitive.name:
            raise NotImplementedError(
                f"{name} must have no {eqn.primitive.name} where a mesh has Explicit axes"
            )
        else:
            params = {k: None if isinstance(x, Sharding) else x for k, x in eqn.params.items()}
            found = eqn.primitive.bind(*xs, **params)
            found = found if eqn.primitive.multiple_results else [found]
        known |= dict(zip(eqn.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]
