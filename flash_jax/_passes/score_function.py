"""A score function of the caller's, ``fn(score, b, h, q_index, k_index)``, as a program.

It is traced once on five scalars, and mapped over the scores of a tile. So it is elementwise
whatever it is written as, and does not know how scores are cut into tiles. A value that depends on
some of the five only, as a distance does on positions, is computed once for all others.

The arrays that it captures become operands of the call: those of floats have derivatives, and any
of them may be traced. What is left captures nothing, and is compared by what it computes: a new
lambda per call, or new values in the same arrays, are the same program to ``jit``.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # pyright: ignore

from .._tiles.jax_versions import without_varying_axes
from .._tiles.tile import QueryTile
from .jaxprs import as_one_kernel, identity, one_kernel, without_constants, without_mesh


class Program:
    """What a score function computes, apart from what it captures.

    Attributes:
        jaxpr: of the captured arrays and five scalars.
        one_kernel: whether the score goes through operations that one kernel may hold.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.jaxpr = jaxpr
        self.one_kernel = one_kernel(jaxpr, len(jaxpr.invars) - 5)
        self.identity, self.opaque = identity(jaxpr)
        self._hash = hash((self.identity, self.opaque))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Program) or self._hash != other._hash:
            return False
        return (self.identity, self.opaque) == (other.identity, other.opaque)

    def like(self, other: Program) -> bool:
        """Whether nothing but functions without a text differ, as derivatives by ``custom_jvp``."""
        return self.identity == other.identity and len(self.opaque) == len(other.opaque)

    def __call__(self, captured: list[Array], *scalars: Array) -> Array:
        return jaxpr_as_fun(ClosedJaxpr(self.jaxpr, []))(*captured, *scalars)[0]

    def as_one_kernel(self, captured: list[Array], *scalars: Array) -> Array:
        """The same for finite numbers, of operations that XLA's library has; else it may be NaN."""
        return as_one_kernel(self.jaxpr, len(captured), [*captured, *scalars])[0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["floats", "others"],
    meta_fields=["program", "differentiable"],
)
@dataclasses.dataclass(frozen=True)
class ScoreFunction:
    """A program and what it captures.

    Attributes:
        floats: captured arrays that have derivatives.
        others: captured integers and bools.
        program: what is computed.
        differentiable: of every captured array, in the program's order, whether it is in floats.
    """

    floats: tuple[Array | None, ...]
    others: tuple[Array, ...]
    program: Program
    differentiable: tuple[bool, ...]

    def bound(self) -> ScoreFunction:
        """With a first axis of size 1 in every captured array, as all operands of a call have."""
        return jax.tree.map(lambda x: x[None], self)

    def of(self, floats: tuple[Array | None, ...]) -> ScoreFunction:
        """With the given floats; None: its own."""
        own = self.floats or (None,) * len(floats)
        floats = tuple(x if x is not None else old for x, old in zip(floats, own, strict=True))
        return dataclasses.replace(self, floats=floats)

    def on_tile(
        self, tile: QueryTile, j: Array, floats: tuple[Array | None, ...], s: Array, fused: bool
    ) -> Array:
        """What the scores s (heads, rows, width) of key tile j become.

        Args:
            floats: the captured floats of the tile's instance.
            fused: of operations that one kernel may hold; see ``Program.as_one_kernel``.
        """
        of_floats, others = iter(floats), iter(map(tile.of_instance, self.others))
        captured: list[Any] = [next(of_floats if own else others) for own in self.differentiable]
        run = self.program.as_one_kernel if fused else self.program
        b, h = tile.element_index, tile.n[:, :, 0, 0]
        q, k, own = tile.t.reshape(-1), tile.s(j)[:, 0, 0], tile.wide is not None

        def of_scalars(s: Array, h: Array, q: Array, k: Array) -> Array:
            return run(captured, s, b, h, q, k)

        mapped = jax.vmap(of_scalars, (0, None, None, 0))
        mapped = jax.vmap(mapped, (0, None, 0, None))
        mapped = jax.vmap(mapped, (0, 0, None, None))
        mapped = jax.vmap(mapped, (0, 0, None, 0 if own else None))  # keys of a head, or of all
        new = mapped(s.reshape(tile.shape()), h, q, k if own else k[0])
        return new.reshape(s.shape).astype(s.dtype)


def score_function(name: str, fn: Any, dtype: np.dtype) -> ScoreFunction | None:
    """``fn`` traced on a score of the dtype and four int32 indices; None stays None.

    Raises:
        TypeError: it is no function, it does not return one float scalar, or it captures an array
            that holds no real numbers.
    """
    if fn is None:
        return None
    if not callable(fn):
        raise TypeError(f"{name} must be a function or None; it is {fn!r}")
    score, index = jax.ShapeDtypeStruct((), dtype), jax.ShapeDtypeStruct((), np.int32)
    # A new function each time: what it captures may have changed since it was last traced.
    with without_varying_axes():
        closed, returned = jax.make_jaxpr(lambda *x: fn(*x), return_shape=True)(
            score, index, index, index, index
        )
    shape: Any = getattr(returned, "shape", None)
    kind: Any = getattr(returned, "dtype", np.bool_)
    if shape != () or not jnp.issubdtype(kind, jnp.floating):
        what = type(returned).__name__ if shape is None else f"{kind} of shape {shape}"
        raise TypeError(
            f"{name} must return a float scalar where its arguments are scalars, as they are while "
            f"it is traced; it returned {what}"
        )
    captured = [jnp.asarray(x) for x in closed.consts]
    for x in captured:
        kinds = jnp.floating, jnp.integer, jnp.bool_
        if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
            raise TypeError(f"{name} must capture real numbers only; it captures {x.dtype}")
    jaxpr = without_mesh(name, without_constants(closed.jaxpr))
    differentiable = tuple(bool(jnp.issubdtype(x.dtype, jnp.floating)) for x in captured)
    pairs = list(zip(captured, differentiable, strict=True))
    return ScoreFunction(
        tuple(x for x, own in pairs if own),
        tuple(x for x, own in pairs if not own),
        _same_program(fn, Program(jaxpr)),
        differentiable,
    )


_PROGRAMS: weakref.WeakKeyDictionary[Callable[..., Any], list[Program]] = (
    weakref.WeakKeyDictionary()
)
_MOST_KEPT = 8


def _same_program(fn: Callable[..., Any], program: Program) -> Program:
    """The program that ``fn`` was before, where it is the same.

    Every trace makes new functions for what is differentiated by a rule of its own, such as
    ``jax.nn.relu``. Those of one function that computes the same are taken to be the same.
    """
    if not program.opaque:
        return program
    try:
        kept = _PROGRAMS.setdefault(fn, [])
    except TypeError:  # no weak reference, or no hash
        return program
    for old in kept:
        if old.like(program):
            return old
    kept.append(program)
    del kept[:-_MOST_KEPT]
    return program
