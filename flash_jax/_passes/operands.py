"""What a pass over the tiles is given: arrays that may be traced, and what is compiled in.

The passes (``_forward``, ``_tangent``, ``_backward``) walk the tiles alike: ``over_query_tiles``
visits every tile of queries of every group of heads, ``over_key_tiles`` the key tiles it may read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.shapes import accumulator
from .._machine.processor import machine
from .._machine.tile_rule import elements_per_step, heads_per_step
from .._masks.schedule import visits
from .._tiles.jax_versions import varying_axes
from .._tiles.layout import Layout
from .._tiles.load import take_tile
from .._tiles.symbolic import as_int32, known, largest
from .._tiles.tile import Axis, BlockSizes, QueryTile
from .dropout import drop
from .scores import Scores

C = TypeVar("C")


class Quantization(NamedTuple):
    """What quantized queries, keys and values carry beside their integers.

    Query t times key s is    q_scale[t] k_scale[s] (q[t] . k[s] - k_zero[s]) + q_shift[t]
    """

    q_scale: Array  # (B, N, T), the softmax scale included
    q_shift: Array | None  # (B, N, T)
    k_scale: Array  # (B, K, S)
    k_zero: Array  # (B, K, S) int32, the product with the zero point of the queries
    v_scale: Array  # (B, K, S, 1) or (B, K, 1, Hv or 1)


class Operands(NamedTuple):
    """What may be traced. An array's first axis is the batch, of size B or 1."""

    q: Array  # (B, N, T, H) or (B, T, N, H), as the layout says; uint8 where quantized
    k: Array  # (B, K, S, H) or (B, S, K, H), alike; int8 where quantized
    v: Array  # (B, K, S, Hv) or (B, S, K, Hv), as k
    scores: Scores
    sinks: Array | None = None  # (B, N): one more logit in the denominator
    dropout_key: Array | None = None  # (B, 2) uint32; (1, 2) where all elements drop the same
    quantization: Quantization | None = None  # None: of floats


class Differentiable(NamedTuple):
    """The operands that have derivatives; None where there is none, or none is asked for."""

    q: Array | None
    k: Array | None
    v: Array | None
    scale: Array | None
    soft_cap: Array | None
    alibi_slopes: Array | None
    bias: Array | None
    sinks: Array | None

    @classmethod
    def of(cls, operands: Operands) -> Differentiable:
        q, k, v, scores, sinks, *_ = operands
        return cls(q, k, v, scores.scale, scores.soft_cap, scores.alibi_slopes, scores.bias, sinks)

    def into(self, operands: Operands) -> Operands:
        """operands with those that are not None here replaced."""
        given = {name: x for name, x in self._asdict().items() if x is not None}
        own = {name: x for name, x in given.items() if name in Operands._fields}
        of_scores = {name: x for name, x in given.items() if name in Scores._fields}
        return operands._replace(scores=operands.scores._replace(**of_scores), **own)


class Static(NamedTuple):
    """What is known before any value is, and compiled in."""

    blocks: BlockSizes
    layout: Layout  # of queries and output
    batch: int  # B of one call: more rows than that are vmapped calls
    dtype: np.dtype  # of the output
    # Of keys and values. Read once per tile of queries, they come heads first where these are many.
    kv_layout: Layout = Layout.HEADS_FIRST
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False  # all heads drop the same
    probabilities: np.dtype | None = None  # what int8 products take them as; None: of floats


class Dimensions(NamedTuple):
    """Dimensions of a pass; rows counts the batch elements of all vmapped calls."""

    rows: int
    N: int
    T: int
    K: int
    S: int
    H: int
    Hv: int
    acc: np.dtype  # of scores and sums

    @classmethod
    def of(cls, operands: Operands, static: Static) -> Dimensions:
        q, k, v, *_ = operands
        rows = [x.shape[0] for x in jax.tree.leaves(operands)]
        (_, N, T, H), (_, K, S, _) = static.layout.sizes(q), static.kv_layout.sizes(k)
        acc = accumulator(static.dtype)
        return cls(largest(rows), N, T, K, S, H, v.shape[-1], acc)

    @property
    def empty(self) -> bool:
        return 0 in self[:-1]


def over_query_tiles(
    operands: Operands,
    static: Static,
    step: Callable[[QueryTile, C], C],
    carry: C,
    copies: int,
    several: bool = False,
) -> C:
    """Folds ``step`` over every tile of queries.

    Args:
        copies: how many arrays of a tile's scores live at once in a step.
        several: whether a step can do several batch elements.
    """
    dims = Dimensions.of(operands, static)
    q, kv = Axis.of(dims.T, static.blocks.q), Axis.of(dims.S, static.blocks.kv)
    groups = dims.N // dims.K
    heads = heads_per_step(machine(), dims.K, groups * q.block, kv.block, copies)
    elements = 1
    if several and known(dims.rows) and kv.count == 1 and heads == dims.K:
        scores, keys = dims.N * q.block * kv.block, dims.K * dims.S * (dims.H + dims.Hv)
        elements = elements_per_step(machine(), dims.rows, scores * copies, keys)

    def at(count: Array, carry: C) -> C:
        row, count = jnp.divmod(count, as_int32(dims.K // heads * q.count))
        group, i = jnp.divmod(count, as_int32(q.count))
        row, batch = row * elements, (dims.rows, static.batch)
        at = (row, batch, row % as_int32(static.batch), group * heads, heads, groups, i, elements)
        return step(QueryTile(q, kv, *at), carry)

    steps = dims.rows // elements * (dims.K // heads) * q.count
    return _loop(np.int32(0), as_int32(steps), at, varying_as(operands, carry))


def over_key_tiles(
    operands: Operands,
    tile: QueryTile,
    full: Callable[[Array, C], C],
    partial: Callable[[Array, C], C],
    carry: C,
) -> C:
    """Folds ``full`` over the key tiles that need no mask, then ``partial`` over those that do."""
    scores = operands.scores
    carry = varying_as(operands, carry)
    if tile.kv.count == 1:
        return (full if scores.always_full(tile.kv) else partial)(jnp.int32(0), carry)
    if scores.always_full(tile.kv):
        return _loop(np.int32(0), as_int32(tile.kv.count), full, carry)
    order, count, end = visits(scores.schedule_row(tile))
    if not scores.always_partial:
        at_full = lambda x, carry: full(order[x], carry)  # noqa: E731
        carry = _loop(np.int32(0), count, at_full, carry)
    return _loop(count, end, lambda x, carry: partial(order[x], carry), carry)


def _loop(start: ArrayLike, end: ArrayLike, step: Callable[[Array, C], C], carry: C) -> C:
    """Folds step(i, carry) over start..end-1.

    Never a ``scan``: reverse mode through it would store every step, where it must be refused.
    """
    return lax.while_loop(
        lambda x: x[0] < end, lambda x: (x[0] + 1, step(*x)), (jnp.asarray(start), carry)
    )[1]


def q_tile(static: Static, tile: QueryTile, x: Array, dtype: np.dtype) -> Array:
    """(heads, groups * block_q, H) of x, laid out as queries."""
    heads, start = tile.heads * tile.groups, tile.q.start(tile.i)
    row, first = tile.row_of(x), tile.head * tile.groups
    taken = take_tile(static.layout, x, row, first, heads, start, tile.q.block)
    return taken.reshape(tile.heads, tile.rows, x.shape[-1]).astype(dtype)


def kv_tile(static: Static, tile: QueryTile, x: Array, j: Array, dtype: np.dtype) -> Array:
    """(heads, block_kv, H) of key tile j of x, laid out as keys."""
    start, row = tile.kv.start(j), tile.row_of(x)
    taken = take_tile(static.kv_layout, x, row, tile.head, tile.heads, start, tile.kv.block)
    return taken.astype(dtype)


def query_rows(tile: QueryTile, x: Array) -> Array:
    """(heads, rows) of x (B, N, T)."""
    n, t = tile.head * tile.groups, tile.q.start(tile.i)
    size = (1, tile.heads * tile.groups, tile.q.block)
    return lax.dynamic_slice(x, (tile.row_of(x), n, t), size).reshape(tile.heads, tile.rows)


def key_columns(tile: QueryTile, x: Array, j: Array) -> Array:
    """(heads, block_kv) of key tile j of x (B, K, S)."""
    start = (tile.row_of(x), tile.head, tile.kv.start(j))
    return lax.dynamic_slice(x, start, (1, tile.heads, tile.kv.block))[0]


def kept_weights(operands: Operands, static: Static, tile: QueryTile, j: Array) -> Array | None:
    """Dropout's factors (heads, rows, block_kv) on the probabilities of key tile j, if any."""
    if operands.dropout_key is None:
        return None
    rate, every_head = static.dropout_rate, static.broadcast_dropout
    return drop(operands.dropout_key, rate, every_head, tile, j, accumulator(static.dtype))


def finite(x: Array) -> Array:
    """x with 0 for NaN and infinities. Masked, it must be finite to vanish: 0 * NaN is NaN."""
    return jnp.where(jnp.isfinite(x), x, 0)


def varying_as(operands: Operands, tree: C) -> C:
    """tree, varying over the mesh axes of a ``shard_map`` that any operand varies over."""
    axes = frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(operands)))

    def vary(x: Array) -> Array:
        # Sorted, since a set's order differs between processes.
        missing = tuple(sorted(axes - varying_axes(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree
