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

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp

from .._tiles.load import put_tile, take_tile
from .._tiles.tile import QueryTile
from .._tiles.xla import dot
from .forward import Results
from .operands import (
    Differentiable,
    Dimensions,
    Operands,
    Static,
    finite,
    kept_weights,
    kv_tile,
    over_key_tiles,
    over_query_tiles,
    q_tile,
    query_rows,
)
from .scores import Local
from .tangent import probabilities


def gradient_shapes(operands: Operands, rows: dict[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the gradients: as the operands', with first axes of ``rows``."""
    of = {name: getattr(Differentiable.of(operands), name) for name in rows}
    return {
        name: jax.ShapeDtypeStruct((rows[name], *x.shape[1:]), x.dtype) for name, x in of.items()
    }


def backward(
    operands: Operands,
    results: Results,
    d_out: Array,
    d_lse: Array,
    static: Static,
    rows: dict[str, int],
) -> dict[str, Array]:
    """Gradients of some operands.

    Args:
        d_out: of the output, shaped as it.
        d_lse: of lse, (B, N, T).
        rows: the operands to differentiate, and the first axis of each gradient. Where it is less
            than that of the output, the gradient is summed over the rows that share an entry.
    """
    dims = Dimensions.of(operands, static)
    shapes = gradient_shapes(operands, rows)
    sums = {name: jnp.zeros(_summed(name, x, static), dims.acc) for name, x in shapes.items()}
    if not dims.empty:
        step = functools.partial(_query_tile, operands, results, d_out, d_lse, static)
        sums = over_query_tiles(operands, static, step, sums, copies=3)
    for name in ("k", "v"):
        if name in sums:
            turned = jnp.swapaxes(sums[name], 2, 3)
            sums[name] = jnp.moveaxis(turned, 2, static.kv_layout.value)
    return {name: x.astype(shapes[name].dtype) for name, x in sums.items()}


def _summed(name: str, x: Any, static: Static) -> tuple[int, ...]:
    """Shape that a gradient is summed in: (B, K, H, S) for keys and values."""
    if name not in ("k", "v"):
        return x.shape
    B, K, S, H = static.kv_layout.sizes(x)
    return B, K, H, S


def _query_tile(
    operands: Operands,
    results: Results,
    d_out: Array,
    d_lse: Array,
    static: Static,
    tile: QueryTile,
    sums: dict[str, Array],
) -> dict[str, Array]:
    """sums with what one tile of queries adds to them."""
    acc, scores = results.lse.dtype, operands.scores
    unscaled = q_tile(static, tile, operands.q, acc)
    q = scores.scaled(tile, unscaled)
    m, l = (query_rows(tile, x) for x in (results.m, results.l))
    d_o = q_tile(static, tile, d_out, acc)
    out = q_tile(static, tile, results.out, acc)
    # In a row that may read no key the output is 0 whatever its gradient is.
    delta = jnp.sum(jnp.where(out == 0, 0, d_o * out), axis=-1) - query_rows(tile, d_lse)
    # Queries that the tile before has, too, count there.
    own = tile.as_rows(tile.t >= tile.i * tile.q.block, 1)
    d_o, delta = jnp.where(own, d_o, 0), jnp.where(own[..., 0], delta, 0)

    def at(masked: bool) -> Callable[[Array, tuple], tuple]:
        clean = finite if masked else lambda x: x
        # Transposed outside the loop over key tiles.
        q_t, d_o_t = (jnp.swapaxes(clean(x), 1, 2) for x in (q, d_o))

        def absorb(j: Array, carry: tuple) -> tuple:
            dq, sums = carry
            k, v = (kv_tile(static, tile, x, j, acc) for x in (operands.k, operands.v))
            s, kept = scores.products(q, k), scores.keep(tile, j) if masked else True
            if masked and scores.soft_cap is not None:
                s = jnp.where(kept, s, 0)  # the slope of tanh at NaN, times 0, is NaN
            s, pull_back = jax.vjp(
                lambda local, s: scores.logits(tile, j, local, s), scores.local(tile, j), s
            )
            if masked:
                s = jnp.where(kept, s, -jnp.inf)
            p = probabilities(s, m, l)
            dp = scores.products(clean(d_o), clean(v))
            weights = kept_weights(operands, static, tile, j)
            if weights is not None:
                dp = dp * weights
            ds = p * (dp - delta[..., None])
            if masked:
                ds = jnp.where(kept, ds, 0)
            if "v" in sums:
                p = p if weights is None else p * weights
                sums = _add_to_keys(sums, "v", tile, j, dot(d_o_t, p))
            d_local, ds = pull_back(ds)
            sums = _add_local(sums, tile, j, d_local)
            if "k" in sums:
                sums = _add_to_keys(sums, "k", tile, j, dot(q_t, ds))
            return dq + dot(ds, clean(k)), sums

        return absorb

    dq, sums = over_key_tiles(operands, tile, at(False), at(True), (jnp.zeros_like(q), sums))
    if "q" in sums:
        sums = _add_to_queries(sums, "q", static, tile, scores.scaled(tile, dq))
    if "scale" in sums:
        sums = _add(
            sums, "scale", (tile.row_of(sums["scale"]),), jnp.sum(dq * finite(unscaled))[None]
        )
    if "sinks" in sums and operands.sinks is not None:
        sink = tile.as_rows(tile.of_heads(operands.sinks).astype(acc), 1)
        d_sink = -probabilities(sink, m, l)[..., 0] * delta
        d_sink = jnp.sum(d_sink.reshape(1, tile.heads * tile.groups, -1), axis=-1)
        n = tile.head * tile.groups
        sums = _add(sums, "sinks", (tile.row_of(sums["sinks"]), n), d_sink)
    return sums


def _add(sums: dict[str, Array], name: str, start: tuple[Array, ...], x: Array) -> dict[str, Array]:
    """sums with x added to the part of sums[name] that begins at start."""
    old = lax.dynamic_slice(sums[name], start, x.shape)
    return sums | {name: lax.dynamic_update_slice(sums[name], old + x, start)}


def _add_to_keys(
    sums: dict[str, Array], name: str, tile: QueryTile, j: Array, x: Array
) -> dict[str, Array]:
    """x (heads, H, block_kv) added to sums[name] (B, K, H, S)."""
    row, zero = tile.row_of(sums[name]), jnp.int32(0)
    return _add(sums, name, (row, tile.head, zero, tile.kv.start(j)), x[None])


def _add_to_queries(
    sums: dict[str, Array], name: str, static: Static, tile: QueryTile, x: Array
) -> dict[str, Array]:
    """x (heads, rows, H) added to sums[name], laid out as queries."""
    heads, n = tile.heads * tile.groups, tile.head * tile.groups
    row, start = tile.row_of(sums[name]), tile.q.start(tile.i)
    x += take_tile(static.layout, sums[name], row, n, heads, start, tile.q.block).reshape(x.shape)
    x = x.reshape(1, heads, tile.q.block, -1)
    return sums | {name: put_tile(static.layout, sums[name], x, row, n, start)}


def _add_local(
    sums: dict[str, Array], tile: QueryTile, j: Array, d_local: Local
) -> dict[str, Array]:
    """The gradients of key tile j's parameters added to those of all."""
    n = tile.head * tile.groups
    if "soft_cap" in sums and d_local.soft_cap is not None:
        row = tile.row_of(sums["soft_cap"])
        sums = _add(sums, "soft_cap", (row,), d_local.soft_cap[None])
    if "alibi_slopes" in sums and d_local.alibi_slopes is not None:
        row = tile.row_of(sums["alibi_slopes"])
        sums = _add(sums, "alibi_slopes", (row, n), d_local.alibi_slopes.reshape(1, -1))
    if "bias" in sums and d_local.bias is not None:
        bias = sums["bias"]
        starts = (n, tile.q.start(tile.i), tile.kv.start(j))
        starts = (
            jnp.where(size == 1, 0, start)
            for size, start in zip(bias.shape[1:], starts, strict=True)
        )
        x = d_local.bias.reshape(1, -1, *d_local.bias.shape[2:])
        sums = _add(sums, "bias", (tile.row_of(bias), *starts), x.astype(bias.dtype))
    return sums
