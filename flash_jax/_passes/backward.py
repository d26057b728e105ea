"""The backward pass: gradients from recomputed probabilities, in one scan over the same tiles.

With p = exp(s - m) / l, dO and dlse the gradients of the output and of lse, and, in a tile,
    delta = rowsum(dO * O) - dlse        dP = dO V^T        dS = P * (dP - delta)
    dV += P^T dO                         dQ += dS K         dK += dS^T Q
The two transposed products would each transpose a tile of scores, XLA's matmul library reading its
left operand by rows only. Transposed as a whole they do not:  dV^T += dO^T P  and  dK^T += Q^T dS
turn the small tiles of dO and Q, once per tile of queries. dK^T and dV^T are summed in place.

Dao, FlashAttention-2, 2023, Algorithm 2, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from .._tiles.axis import Axis
from .._tiles.tile import QueryTile
from .._tiles.xla import dot
from .backward_kernels import Rows, kernel_step
from .forward import Results
from .gradients import Gradients, gradient_shapes
from .nonfinite import finite
from .operands import Dimensions, Operands, kept_weights, kv_tile, q_tile, query_rows
from .plan import Plan
from .probabilities import probabilities
from .walk import key_tiles, over_key_tiles, over_query_tiles


def backward(
    operands: Operands,
    results: Results,
    d_out: Array,
    d_lse: Array,
    plan: Plan,
    entries: dict[str, int],
    dtype: np.dtype | None = None,
) -> dict[str, Array]:
    """Gradients of some operands.

    Args:
        d_out: of the output, shaped as it.
        d_lse: of lse, (B, N, T).
        entries: the operands to differentiate, and the first axis of each gradient. Where that is
            less than the output's, the gradient is summed over the instances that share an entry.
        dtype: of the gradients; None: each has that of its operand.
    """
    dims = Dimensions.of(operands, plan)
    shapes = gradient_shapes(operands, entries, dtype)
    gradients = Gradients.start(operands, plan, entries)
    if dims.empty:
        return gradients.finish(shapes)
    if plan.multiplied is not None:
        plan = plan.of_backward
    arrays = operands, results, d_out, d_lse

    def step(tile: QueryTile, gradients: Gradients) -> Gradients:
        if tile.together == 1:
            return backward_tile(*arrays, plan, tile, gradients)
        return gradients.add_instances(tile, tile.each(of_instance, arrays))

    def of_instance(tile: QueryTile, arrays: tuple[Operands, Results, Array, Array]) -> Gradients:
        none = Gradients.start(arrays[0], plan, dict.fromkeys(entries, 1))
        return backward_tile(*arrays, plan, tile, none)

    # Of several instances that lie in one tile each, and share either all of an operand or nothing.
    several = (
        Axis.of(dims.T, plan.blocks.q).count == 1 and Axis.of(dims.S, plan.blocks.kv).count == 1
    )
    several = several and {*entries.values()} <= {1, dims.instances}
    copies = 1 if plan.multiplied is not None else 3
    gradients = over_query_tiles(operands, plan, step, gradients, copies=copies, several=several)
    return gradients.finish(shapes)


def backward_tile(
    operands: Operands,
    results: Results,
    d_out: Array,
    d_lse: Array,
    plan: Plan,
    tile: QueryTile,
    gradients: Gradients,
) -> Gradients:
    """The sums with what one tile of queries adds to them."""
    acc, scores = results.lse.dtype, operands.scores
    unscaled = q_tile(plan, tile, operands.q, acc)
    q = scores.scaled(tile, unscaled)
    m, l = (query_rows(tile, x) for x in (results.m, results.l))
    d_o = q_tile(plan, tile, d_out, acc)
    out = q_tile(plan, tile, results.out, acc)
    # In a row that may read no key the output is 0 whatever its gradient is.
    delta = jnp.sum(jnp.where(out == 0, 0, d_o * out), axis=-1) - query_rows(tile, d_lse)
    # Queries that the tile before has, too, count there.
    own = tile.as_rows(tile.own_queries, 1)
    d_o, delta = jnp.where(own, d_o, 0), jnp.where(own[..., 0], delta, 0)
    plain = scores.soft_cap is None and scores.function is None

    def step(masked: bool) -> Callable[[Array, tuple], tuple]:
        clean = finite if masked else lambda x: x
        # Transposed outside the loop over key tiles.
        q_t, d_o_t = (jnp.swapaxes(clean(x), 1, 2) for x in (q, d_o))

        def at(j: Array, carry: tuple[Array, Gradients]) -> tuple[Array, Gradients]:
            dq, gradients = carry
            k, v = (kv_tile(plan, tile, x, j, acc) for x in (operands.k, operands.v))
            s, kept = scores.products(q, k), scores.keep(tile, j) if masked else True
            if masked and not plain:
                s = jnp.where(kept, s, 1)  # the slope of tanh at NaN, times 0, is NaN
            s, pull_back = jax.vjp(
                lambda local, s: scores.logits(tile, j, local, s), scores.local(tile, j), s
            )
            if masked:
                s = jnp.where(kept, s, -jnp.inf)
                kept = scores.kept_logits(jnp.asarray(kept), s)
            p, dp = probabilities(s, m, l), scores.products(clean(d_o), clean(v))
            p_v, weights = p, kept_weights(operands, plan, tile, j)
            if weights is not None:
                p_v, dp = p * weights, dp * weights
            ds = p * (dp - delta[..., None])
            if masked:
                ds = jnp.where(kept, ds, 0)
            d_local, ds = pull_back(ds)
            if masked and scores.function is not None:
                ds = jnp.where(kept, ds, 0)  # a slope may be NaN there
            gradients = gradients.add_keys("v", tile, j, dot(d_o_t, p_v))
            gradients = gradients.add_local(tile, j, d_local)
            gradients = gradients.add_keys("k", tile, j, dot(q_t, ds))
            return dq + dot(ds, clean(k)), gradients

        return at

    def by_kernels(masked: bool) -> Callable[[Array, tuple], tuple]:
        if masked or plan.multiplied is None or not plain or scores.alibi_slopes is not None:
            return step(masked)
        rows = Rows(unscaled, d_o, m, l, delta)
        return kernel_step(operands, plan, plan.multiplied, tile, rows)

    carry, visited = (jnp.zeros_like(q), gradients), key_tiles(operands, tile)
    dq, gradients = over_key_tiles(operands, tile, visited, by_kernels, carry)
    gradients = gradients.add_queries("q", tile, scores.scaled(tile, dq))
    gradients = gradients.add_instance("scale", tile, jnp.sum(dq * finite(unscaled)))
    if operands.sinks is None:
        return gradients
    sink = tile.as_rows(tile.of_heads(operands.sinks).astype(acc), 1)
    d_sink = -probabilities(sink, m, l)[..., 0] * delta
    d_sink = jnp.sum(d_sink.reshape(tile.heads * tile.groups, -1), axis=-1)
    return gradients.add_heads("sinks", tile, d_sink)
