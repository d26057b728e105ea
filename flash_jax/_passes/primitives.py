"""Attention as JAX primitives, so that every transformation has its rule.

    attention   (operands) -> (out, lse, m, l)                   jvp: attention and tangent
    tangent     (operands, results, tangents) -> (dout, dlse)    linear in the tangents
    gradient    (operands, results, dout, dlse) -> gradients     its transpose

Reverse mode is the transpose of forward mode, so one rule gives ``jvp`` and ``grad``, both in
linear memory. ``custom_vjp`` would rule out forward mode, and ``custom_jvp`` alone would have JAX
transpose the scan itself, storing what every step computed. ``tangent`` and ``gradient`` are loops
of ordinary operations, which forward mode goes through: that gives Hessian-vector products (forward
over reverse). A second reverse pass would store every step, and is refused.

What the backward pass needs of the forward pass is named ``flash_attention``: under
``jax.checkpoint`` the policy ``save_only_these_names("flash_attention")`` keeps it, and attention
runs once.

``rules`` has what they have in common.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .._tiles.symbolic import known
from .backward import backward, gradient_shapes
from .forward import Results, forward, forward_shapes, output
from .operands import Differentiable, Operands, flatten, names, unflatten, varying_as
from .plan import Plan
from .ring import ring_backward, ring_forward, ring_tangent
from .rules import Entries, primitive, run_of, shapes_of, with_rules
from .tangent import tangent
from .whole_tiles import in_whole_tiles


def attention(operands: Operands, plan: Plan) -> tuple[Array, Array | None]:
    """Output, laid out as q and of its dtype, and natural-log lse (B, N, T), None if not asked."""
    T = plan.layout.sizes(operands.q)[2]
    operands = in_whole_tiles(operands, plan)
    leaves, tree = flatten(varying_as(operands, operands))
    out, *rest = attention_p.bind(*leaves, tree=tree, plan=plan, calls=0, statistics=plan.lse)
    lse = rest[0] if rest else None
    if known(T):
        return out, lse
    out = lax.slice_in_dim(out, 0, T, axis=plan.layout.value)
    return out, None if lse is None else lse[..., :T]


def _attention(*leaves: Array, tree: Any, plan: Plan, statistics: bool) -> list[Array]:
    operands, _ = unflatten(tree, leaves)
    if plan.ring is not None:
        return list(ring_forward(operands, plan))[: None if statistics else 1]
    return list(forward(operands, plan)) if statistics else [output(operands, plan)]


def _attention_shapes(*leaves: Any, tree: Any, plan: Plan, statistics: bool) -> list[Any]:
    results = forward_shapes(unflatten(tree, leaves)[0], plan)
    return list(results) if statistics else [results.out]


def _tangent(*leaves: Array, tree: Any, plan: Plan, wrt: tuple[str, ...]) -> list[Array]:
    operands, others = unflatten(tree, leaves)
    tangents = Differentiable.of(operands).named(dict(zip(wrt, others[4:], strict=True)))
    run = tangent if plan.ring is None else ring_tangent
    return list(run(operands, Results(*others[:4]), tangents, plan))


def _tangent_shapes(*leaves: Any, tree: Any, plan: Plan, wrt: tuple[str, ...]) -> list[Any]:
    return _attention_shapes(*leaves, tree=tree, plan=plan, statistics=True)[:2]


def _gradient(
    *leaves: Array, tree: Any, plan: Plan, wrt: tuple[str, ...], entries: Entries
) -> list[Array]:
    operands, (*results, d_out, d_lse) = unflatten(tree, leaves)
    sizes = dict(zip(wrt, map(math.prod, entries), strict=True))
    run = backward if plan.ring is None else ring_backward
    gradients = run(operands, Results(*results), d_out, d_lse, plan, sizes)
    return [gradients[name] for name in wrt]


def _gradient_shapes(
    *leaves: Any, tree: Any, plan: Plan, wrt: tuple[str, ...], entries: Entries
) -> list[Any]:
    sizes = dict(zip(wrt, map(math.prod, entries), strict=True))
    return list(gradient_shapes(unflatten(tree, leaves)[0], sizes).values())


attention_p = primitive("attention", _attention, _attention_shapes)
tangent_p = primitive("tangent", _tangent, _tangent_shapes)
gradient_p = primitive("gradient", _gradient, _gradient_shapes)


def _attention_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, statistics: bool, **static: Any
) -> tuple[list[Array], list[Any]]:
    operands, _ = unflatten(static["tree"], primals)
    # Integers have no derivatives: their callers give those of the floats that they stand for.
    assert operands.quantization is None
    results = attention_p.bind(*primals, **static, statistics=True)
    results = [checkpoint_name(x, "flash_attention") for x in results]
    _, _, m, l = results
    pairs = zip(names(static["tree"]), tangents, strict=False)
    given = {name: x for name, x in pairs if not isinstance(x, ad.Zero)}
    count = len(results) if statistics else 1  # how many the caller asked for
    if not given:
        return results[:count], [jnp.zeros_like(x) for x in results[:count]]
    moving = tangent_p.bind(*primals, *results, *given.values(), **static, wrt=tuple(given))
    # lse = m + log l, with m held still.
    return results[:count], [*moving, jnp.zeros_like(m), l * moving[1]][:count]


def _derivative(primitive: Primitive) -> Primitive:
    """Forward mode of ``primitive`` as a primitive: loops alone would not be divided over a mesh.

    It takes the leaves of ``primitive``, and the tangents of those that ``moving`` tells by their
    indices.
    """

    def run(*leaves: Array, moving: tuple[int, ...], **static: Any) -> list[Array]:
        still, tangents = leaves[: -len(moving)], leaves[-len(moving) :]
        return _through_loops(primitive, still, moving, tangents, static)[1]

    def shapes(*leaves: Any, moving: tuple[int, ...], **static: Any) -> list[Any]:
        return shapes_of[primitive](*leaves[: -len(moving)], **static)

    return with_rules(f"{primitive.name.removeprefix('flash_')}_jvp", run, shapes)


def _jvp(
    primitive: Primitive,
    derivative: Primitive,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    **static: Any,
) -> tuple[list[Array], list[Array]]:
    """Forward mode through ``primitive``, tangent or gradient."""
    moving = _moving(tangents)
    known = static["tree"].num_leaves + len(Results._fields)
    results = primitive.bind(*primals, **static)
    if moving[0] >= known:  # the results are linear in these
        linear = map(ad.instantiate_zeros, tangents[known:])
        return results, primitive.bind(*primals[:known], *linear, **static)
    given = [tangents[i] for i in moving]
    return results, derivative.bind(*primals, *given, moving=moving, **static)


def _jvp_of_loops(
    primitive: Primitive, primals: Sequence[Any], tangents: Sequence[Any], **static: Any
) -> tuple[list[Array], list[Array]]:
    """Third and later derivatives: forward mode through the loops of ``primitive``."""
    moving = _moving(tangents)
    given = [tangents[i] for i in moving]
    with jax.disable_jit(False):  # of the loops, which would run step by step
        results, d_results = _through_loops(primitive, primals, moving, given, static)
    return results, [_forward_only_p.bind(x) for x in d_results]


def _moving(tangents: Sequence[Any]) -> tuple[int, ...]:
    """The indices of the tangents that are not known to be zero."""
    return tuple(i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero))


def _through_loops(
    primitive: Primitive,
    leaves: Sequence[Array],
    moving: Sequence[int],
    tangents: Sequence[Array],
    static: dict[str, Any],
) -> tuple[list[Array], list[Array]]:
    """Results of ``primitive``, and their tangents from those of the leaves ``moving``."""

    def of_moving(*xs: Array) -> list[Array]:
        moved = list(leaves)
        for i, x in zip(moving, xs, strict=True):
            moved[i] = x
        return run_of[primitive](*moved, **static)

    return jax.jvp(of_moving, [leaves[i] for i in moving], list(tangents))


def _tangent_transpose(cotangents: Sequence[Any], *leaves: Any, **static: Any) -> list[Any]:
    count = len(static["wrt"])
    known, linear = leaves[:-count], leaves[-count:]
    entries = tuple(x.aval.shape[: static["calls"] + 1] for x in linear)
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    return [None] * len(known) + gradient_p.bind(*known, *cotangents, entries=entries, **static)


def _gradient_transpose(
    cotangents: Sequence[Any], *leaves: Any, entries: Entries, **static: Any
) -> list[Any]:
    known = leaves[:-2]
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    return [None] * len(known) + tangent_p.bind(*known, *cotangents, **static)


def _no_second_reverse_pass(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "attention has no second reverse pass, nor one through its jvp: each would store every "
        "score. Second derivatives are forward mode over reverse mode: jax.jvp or jax.jacfwd of "
        "jax.grad"
    )


# The identity, on what forward mode makes of the loops.
_forward_only_p = Primitive("flash_forward_only")
_forward_only_p.def_impl(lambda x: x)
_forward_only_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_forward_only_p, lambda _, x: [x])
batching.defvectorized(_forward_only_p)
ad.deflinear2(_forward_only_p, _no_second_reverse_pass)

ad.primitive_jvps[attention_p] = _attention_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[gradient_p] = _gradient_transpose
for _p in (tangent_p, gradient_p):
    _of_p = _derivative(_p)
    ad.primitive_jvps[_p] = functools.partial(_jvp, _p, _of_p)
    ad.primitive_jvps[_of_p] = functools.partial(_jvp_of_loops, _of_p)
    ad.primitive_transposes[_of_p] = _no_second_reverse_pass
