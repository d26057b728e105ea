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

A ``vmap`` folds its axis into the batch: the loops keep their trip counts, and tiles do not grow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .._checks.shapes import no_taylor_series
from .._tiles.jax_versions import report_nan
from .._tiles.symbolic import known
from .backward import backward, gradient_shapes
from .forward import Results, forward, forward_shapes, output
from .operands import Differentiable, Operands, varying_as
from .plan import Plan
from .ring import ring_backward, ring_forward, ring_tangent
from .tangent import tangent
from .whole_tiles import in_whole_tiles


def attention(operands: Operands, plan: Plan) -> tuple[Array, Array | None]:
    """Output, laid out as q and of its dtype, and natural-log lse (B, N, T), None if not asked."""
    T = plan.layout.sizes(operands.q)[2]
    operands = in_whole_tiles(operands, plan)
    leaves, tree = jax.tree.flatten(_split(varying_as(operands, operands)))
    out, *rest = attention_p.bind(*leaves, tree=tree, plan=plan, statistics=plan.lse)
    lse = rest[0] if rest else None
    if known(T):
        return out, lse
    out = lax.slice_in_dim(out, 0, T, axis=plan.layout.value)
    return out, None if lse is None else lse[..., :T]


def _split(operands: Operands) -> tuple[Differentiable, Operands]:
    """What has derivatives, first, and the rest."""
    scores = operands.scores._replace(scale=None, soft_cap=None, alibi_slopes=None, bias=None)
    rest = operands._replace(q=None, k=None, v=None, scores=scores, sinks=None)
    return Differentiable.of(operands), rest


def _join(tree: Any, leaves: Sequence[Any]) -> tuple[Operands, list[Any]]:
    """The operands among the first leaves, and the leaves behind them."""
    n = tree.num_leaves
    differentiable, rest = jax.tree.unflatten(tree, leaves[:n])
    return differentiable.into(rest), list(leaves[n:])


def _names(tree: Any) -> list[str]:
    """Names of the differentiable operands, in the order of their leaves."""
    differentiable, _ = jax.tree.unflatten(tree, [0] * tree.num_leaves)
    return [name for name, x in differentiable._asdict().items() if x is not None]


def _attention(*leaves: Array, tree: Any, plan: Plan, statistics: bool) -> list[Array]:
    operands, _ = _join(tree, leaves)
    if plan.ring is not None:
        return list(ring_forward(operands, plan))[: None if statistics else 1]
    return list(forward(operands, plan)) if statistics else [output(operands, plan)]


def _attention_shapes(*leaves: Any, tree: Any, plan: Plan, statistics: bool) -> list[Any]:
    results = forward_shapes(_join(tree, leaves)[0], plan)
    return list(results) if statistics else [results.out]


def _tangent(*leaves: Array, tree: Any, plan: Plan, wrt: tuple[str, ...]) -> list[Array]:
    operands, others = _join(tree, leaves)
    tangents = dict.fromkeys(Differentiable._fields) | dict(zip(wrt, others[4:], strict=True))
    run = tangent if plan.ring is None else ring_tangent
    return list(run(operands, Results(*others[:4]), Differentiable(**tangents), plan))


def _tangent_shapes(*leaves: Any, tree: Any, plan: Plan, wrt: tuple[str, ...]) -> list[Any]:
    return _attention_shapes(*leaves, tree=tree, plan=plan, statistics=True)[:2]


def _gradient(
    *leaves: Array, tree: Any, plan: Plan, wrt: tuple[str, ...], entries: tuple[int, ...]
) -> list[Array]:
    operands, (*results, d_out, d_lse) = _join(tree, leaves)
    sizes = dict(zip(wrt, entries, strict=True))
    run = backward if plan.ring is None else ring_backward
    gradients = run(operands, Results(*results), d_out, d_lse, plan, sizes)
    return [gradients[name] for name in wrt]


def _gradient_shapes(
    *leaves: Any, tree: Any, plan: Plan, wrt: tuple[str, ...], entries: tuple[int, ...]
) -> list[Any]:
    sizes = dict(zip(wrt, entries, strict=True))
    return list(gradient_shapes(_join(tree, leaves)[0], sizes).values())


def _primitive(
    name: str, function: Callable[..., list[Array]], shapes: Callable[..., list[Any]]
) -> Primitive:
    """A primitive that runs ``function``, with rules to compile and to batch it."""
    primitive = Primitive(f"flash_{name}")
    primitive.multiple_results = True

    @primitive.def_impl
    def _(*leaves: Array, **static: Any) -> list[Array]:
        # As JAX's own primitives, it is compiled within ``jax.disable_jit``, too.
        with jax.disable_jit(False):
            return _compiled(primitive, tuple(sorted(static.items())))(*leaves)

    @primitive.def_abstract_eval
    def _(*leaves: Any, **static: Any) -> list[Any]:
        update = leaves[0].update  # of the same mesh axes: all leaves vary over the same
        return [
            update(shape=x.shape, dtype=x.dtype, weak_type=False) for x in shapes(*leaves, **static)
        ]

    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True))
    batching.primitive_batchers[primitive] = functools.partial(_fold, primitive)
    jet.jet_rules[primitive] = no_taylor_series
    report_nan(primitive)
    return primitive


@functools.lru_cache(maxsize=256)
def _compiled(primitive: Primitive, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(lambda *leaves: primitive.bind(*leaves, **dict(static)))


def _fold(
    primitive: Primitive, leaves: Sequence[Array], axes: Sequence[Any], **static: Any
) -> tuple[list[Array], list[int]]:
    """Batching: the new axis joins the batch, the first axis of every leaf."""
    size = next(x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None)
    # Behind the operands come the results that belong to them, and what is linear. Queries and
    # results stay together, and tell how many instances there are.
    count = static["tree"].num_leaves
    own = {0, *range(count, count + len(Results._fields))} if len(leaves) > count else set()

    def folded(i: int, x: Array, axis: int | None) -> Array:
        if axis is None and x.shape[0] == 1 and i not in own:
            return x  # still serves every instance
        x = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        return x.reshape(size * x.shape[1], *x.shape[2:])

    if "entries" in static:  # every call has its own gradients, of shared operands, too
        static["entries"] = tuple(size * n for n in static["entries"])
    leaves = [folded(i, x, axis) for i, (x, axis) in enumerate(zip(leaves, axes, strict=True))]
    results = primitive.bind(*leaves, **static)
    results = [x.reshape(size, x.shape[0] // max(size, 1), *x.shape[1:]) for x in results]
    return results, [0] * len(results)


attention_p = _primitive("attention", _attention, _attention_shapes)
tangent_p = _primitive("tangent", _tangent, _tangent_shapes)
gradient_p = _primitive("gradient", _gradient, _gradient_shapes)


def _attention_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, tree: Any, plan: Plan, statistics: bool
) -> tuple[list[Array], list[Any]]:
    operands, _ = _join(tree, primals)
    # Integers have no derivatives: their callers give those of the floats that they stand for.
    assert operands.quantization is None
    results = attention_p.bind(*primals, tree=tree, plan=plan, statistics=True)
    results = [checkpoint_name(x, "flash_attention") for x in results]
    _, _, m, l = results
    names = _names(tree)
    given = {
        name: x for name, x in zip(names, tangents, strict=False) if not isinstance(x, ad.Zero)
    }
    count = len(results) if statistics else 1  # how many the caller asked for
    if not given:
        return results[:count], [jnp.zeros_like(x) for x in results[:count]]
    moving = tangent_p.bind(
        *primals, *results, *given.values(), tree=tree, plan=plan, wrt=tuple(given)
    )
    # lse = m + log l, with m held still.
    return results[:count], [*moving, jnp.zeros_like(m), l * moving[1]][:count]


def _jvp(
    primitive: Primitive,
    function: Callable[..., list[Array]],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    **static: Any,
) -> tuple[list[Array], list[Array]]:
    """Forward mode through ``primitive``, which runs the loops of ``function``."""
    moving = [i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero)]
    known = static["tree"].num_leaves + len(Results._fields)
    if moving[0] >= known:  # the results are linear in these
        linear = map(ad.instantiate_zeros, tangents[known:])
        bind = functools.partial(primitive.bind, *primals[:known], **static)
        return bind(*primals[known:]), bind(*linear)

    def of_moving(*xs: Array) -> list[Array]:
        leaves = list(primals)
        for i, x in zip(moving, xs, strict=True):
            leaves[i] = x
        return function(*leaves, **static)

    with jax.disable_jit(False):  # of the loops, which would run step by step
        results, d_results = jax.jvp(
            of_moving, [primals[i] for i in moving], [tangents[i] for i in moving]
        )
    return results, [_forward_only_p.bind(x) for x in d_results]


def _tangent_transpose(cotangents: Sequence[Any], *leaves: Any, **static: Any) -> list[Any]:
    count = len(static["wrt"])
    known, linear = leaves[:-count], leaves[-count:]
    entries = tuple(x.aval.shape[0] for x in linear)
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    return [None] * len(known) + gradient_p.bind(*known, *cotangents, entries=entries, **static)


def _gradient_transpose(
    cotangents: Sequence[Any], *leaves: Any, entries: tuple[int, ...], **static: Any
) -> list[Any]:
    known = leaves[:-2]
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    return [None] * len(known) + tangent_p.bind(*known, *cotangents, **static)


def _no_second_reverse_pass(*_: Any) -> Any:
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
ad.primitive_jvps[tangent_p] = functools.partial(_jvp, tangent_p, _tangent)
ad.primitive_jvps[gradient_p] = functools.partial(_jvp, gradient_p, _gradient)
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[gradient_p] = _gradient_transpose
