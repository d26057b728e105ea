"""Ring attention: the sequences lie on several devices, and keys travel round them.

In each round a device attends from its queries to the keys that it has just got, and passes them
on. States over disjoint keys merge (``online_softmax``), so the result is exact. From the merged
statistics every part recomputes its own probabilities: so tangents of the parts are summed, and so
are gradients. Those of keys travel with their keys, and come home at the end. A device holds its
own share and one more of the keys, in both passes.

In zigzag order device i of n holds blocks i and 2n - 1 - i of 2n. Under a causal mask every device
then attends to two whole blocks in every round but its own, where it is one and two halves.

Liu et al., Ring attention, 2023, https://arxiv.org/abs/2310.01889
Brandon et al., Striped attention, 2023 (causal work made even), https://arxiv.org/abs/2311.09431
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from . import online_softmax as online
from .axes import operand_axes
from .backward import backward
from .forward import Results, forward
from .gradients import gradient_shapes
from .operands import Differentiable, Dimensions, Operands, varying_as
from .plan import Plan, Ring
from .ring_parts import Part, some_pair
from .tangent import tangent

C = TypeVar("C")
ROWS, OUT = "BNT", "BNT."


def ring_forward(operands: Operands, plan: Plan) -> Results:
    """As ``forward``, over the keys of all devices."""
    dims = Dimensions.of(operands, plan)
    if dims.empty:
        return forward(operands, plan)
    rows, names = (dims.instances, dims.N, dims.T), operand_axes(operands, plan)
    state = online.State(
        jnp.full(rows, -jnp.inf, dims.acc),
        jnp.zeros(rows, dims.acc),
        jnp.zeros((*rows, dims.Hv), dims.acc),
    )
    axes = online.State(ROWS, ROWS, OUT)  # pyright: ignore[reportArgumentType]

    def step(part: Part, operands: Operands, state: online.State) -> online.State:
        out, lse, _, _ = forward(part.of(operands, names), plan.without_ring)
        new = online.State(lse, (~jnp.isneginf(lse)).astype(dims.acc), out)
        merged = online.merge(jax.tree.map(part.cut, state, axes), new)
        return jax.tree.map(part.put, state, merged, axes)

    state, _ = _over_rounds(operands, plan, lambda *x: (step(*x[:3]), x[3]), state, ())
    out, lse = online.finish(state)
    return Results(out.astype(plan.dtype), lse, state.m, state.l)


def ring_tangent(
    operands: Operands, results: Results, tangents: Differentiable, plan: Plan
) -> tuple[Array, Array]:
    """As ``tangent``, over the keys of all devices."""
    dims = Dimensions.of(operands, plan)
    if dims.empty:
        return tangent(operands, results, tangents, plan)
    d_results = jnp.zeros(results.out.shape, dims.acc), jnp.zeros_like(results.lse)
    names = operand_axes(operands, plan)
    axes = Differentiable.of(names).by_name()
    given = tangents.by_name()

    def step(
        part: Part, operands: Operands, d_results: tuple[Array, Array], moving: dict[str, Array]
    ) -> tuple[tuple[Array, Array], dict[str, Array]]:
        cut = {name: part.cut(x, axes[name]) for name, x in (staying | moving).items()}
        own = tangents.named(cut)
        rows = _rows(part, results)
        rows = rows._replace(out=rows.out.astype(dims.acc))  # as d_results, which are sums
        new = tangent(part.of(operands, names), rows, own, plan.without_ring)
        return tuple(map(part.add, d_results, new, (OUT, ROWS))), moving  # pyright: ignore

    moving = {name: x for name, x in given.items() if _travels(x, axes[name], dims.S)}
    staying = {name: x for name, x in given.items() if name not in moving}
    (d_out, d_lse), _ = _over_rounds(operands, plan, step, d_results, moving)
    return d_out.astype(results.out.dtype), d_lse


def ring_backward(
    operands: Operands,
    results: Results,
    d_out: Array,
    d_lse: Array,
    plan: Plan,
    entries: dict[str, int],
) -> dict[str, Array]:
    """As ``backward``; a key's gradient has what the queries of all devices give."""
    dims, shapes = Dimensions.of(operands, plan), gradient_shapes(operands, entries)
    if dims.empty:
        return backward(operands, results, d_out, d_lse, plan, entries)
    names = operand_axes(operands, plan)
    axes = Differentiable.of(names).by_name()
    sums = {name: jnp.zeros(x.shape, dims.acc) for name, x in shapes.items()}
    moving = {name: x for name, x in sums.items() if _travels(x, axes[name], dims.S)}
    staying = {name: x for name, x in sums.items() if name not in moving}

    def step(
        part: Part, operands: Operands, staying: dict[str, Array], moving: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        cotangents = part.cut(d_out, OUT), part.cut(d_lse, ROWS)
        own = part.of(operands, names), _rows(part, results)
        new = backward(*own, *cotangents, plan.without_ring, entries, dims.acc)
        add = lambda xs: {name: part.add(x, new[name], axes[name]) for name, x in xs.items()}  # noqa: E731
        return add(staying), add(moving)

    staying, moving = _over_rounds(operands, plan, step, staying, moving, home=True)
    return {name: (staying | moving)[name].astype(x.dtype) for name, x in shapes.items()}


def _rows(part: Part, results: Results) -> Results:
    return Results(*map(part.cut, results, (OUT, ROWS, ROWS, ROWS)))


def _travels(x: Any, axes: str, S: int) -> bool:
    """Whether an array is of this device's keys, whichever queries they meet."""
    of_queries = "T" in axes and x.shape[axes.index("T")] != 1
    return "S" in axes and x.shape[axes.index("S")] == S and not of_queries


def _over_rounds(
    operands: Operands,
    plan: Plan,
    step: Callable[[Part, Operands, C, Any], tuple[C, Any]],
    carry: C,
    moving: Any,
    home: bool = False,
) -> tuple[C, Any]:
    """Folds ``step`` over all parts of the queries and keys that meet, round by round.

    Args:
        step: of a part, the operands with the keys of that round, the carry and what moves.
        moving: what travels with the keys.
        home: whether it comes back at the end.
    """
    ring, dims = plan.ring, Dimensions.of(operands, plan)
    assert ring is not None
    if not ring.rounds:
        return varying_as(operands, (carry, moving))
    device = lax.axis_index(ring.axis)
    leaves, tree = jax.tree.flatten(operands)
    names = operand_axes(operands, plan)
    pairs = zip(leaves, jax.tree.leaves(names), strict=True)
    travels = [_travels(x, axes, dims.S) for x, axes in pairs]
    keys = [x for x, moves in zip(leaves, travels, strict=True) if moves]

    def with_keys(keys: list[Array]) -> Operands:
        taken = iter(keys)
        own = zip(leaves, travels, strict=True)
        return jax.tree.unflatten(tree, [next(taken) if moves else x for x, moves in own])

    hops = [int(x) for x in np.diff(ring.rounds, prepend=0)]
    kinds = sorted({*hops})
    which = np.array([kinds.index(hop) for hop in hops], np.int32)
    rounds = np.array(ring.rounds, np.int32)

    def round_(x: tuple[Array, Any, C, Any]) -> tuple[Array, Any, C, Any]:
        count, keys, carry, moving = x
        hop = [functools.partial(_send, ring, kind) for kind in kinds]
        keys, moving = lax.switch(jnp.asarray(which)[count], hop, (keys, moving))
        source = (device - jnp.asarray(rounds)[count]) % np.int32(ring.size)
        part = Part(ring, dims.T, dims.S, device, source)
        here = with_keys(keys)
        visit = lambda part, x: step(part, here, *x)  # noqa: E731
        carry, moving = _over_parts(here, plan, part, visit, (carry, moving))
        return count + 1, keys, carry, moving

    start = jnp.int32(0), *varying_as(operands, (keys, carry, moving))
    _, _, carry, moving = lax.while_loop(lambda x: x[0] < len(rounds), round_, start)
    return carry, _send(ring, (ring.size - ring.rounds[-1]) % ring.size, moving) if home else moving


def _send(ring: Ring, hop: int, x: C) -> C:
    """x of the device that is ``hop`` before this one."""
    pairs = [(i, (i + hop) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, pairs), x) if hop else x


def _over_parts(
    operands: Operands, plan: Plan, part: Part, visit: Callable[[Part, C], C], carry: C
) -> C:
    """Folds ``visit`` over the parts of queries and keys of which some pair is kept."""
    parts = part.ring.parts
    at = lambda x: part._replace(a=x // parts, b=x % parts)  # noqa: E731
    if operands.scores.mask is None and parts == 1:
        return visit(part, carry)
    names = operand_axes(operands, plan)
    met = lambda x: some_pair(at(x).of(operands, names), plan)  # noqa: E731
    met = jax.vmap(met)(lax.iota(np.int32, parts**2))
    order, end = jnp.argsort(~met, stable=True).astype(np.int32), jnp.sum(met, dtype=np.int32)
    start = varying_as(operands, (jnp.int32(0), carry))
    loop = lambda x: (x[0] + 1, visit(at(order[x[0]]), x[1]))  # noqa: E731
    return lax.while_loop(lambda x: x[0] < end, loop, start)[1]
