"""What a pass is given that may be traced: queries, keys, values, and what goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._checks.shapes import accumulator
from .._tiles.jax_versions import varying_axes
from .._tiles.load import take_tile, take_tiles_at
from .._tiles.symbolic import largest
from .._tiles.tile import Origin, QueryTile
from . import online_softmax as online
from .dropout import drop
from .plan import Plan
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
    pages: Array | None = None  # (B, M): where k and v are pools (1, pages, K, P, H), a row's pages
    origin: Origin | None = None  # (1,) int32 each; None: these are all arrays of the call


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


def flatten(operands: Operands) -> tuple[list[Any], Any]:
    """The leaves of operands, those that have derivatives first, and what ``unflatten`` needs."""
    scores = operands.scores._replace(scale=None, soft_cap=None, alibi_slopes=None, bias=None)
    rest = operands._replace(q=None, k=None, v=None, scores=scores, sinks=None)
    return jax.tree.flatten((Differentiable.of(operands), rest))


def unflatten(tree: Any, leaves: Sequence[Any]) -> tuple[Operands, list[Any]]:
    """The operands among the first leaves, and the leaves behind them."""
    n = tree.num_leaves
    differentiable, rest = jax.tree.unflatten(tree, leaves[:n])
    return differentiable.into(rest), list(leaves[n:])


def names(tree: Any) -> list[str]:
    """Names of the differentiable operands, in the order of their leaves."""
    differentiable, _ = jax.tree.unflatten(tree, [0] * tree.num_leaves)
    return [name for name, x in differentiable._asdict().items() if x is not None]


class Dimensions(NamedTuple):
    """Dimensions of a pass; instances counts the batch elements of all vmapped calls."""

    instances: int
    N: int
    T: int
    K: int
    S: int
    H: int
    Hv: int
    acc: np.dtype  # of scores and sums

    @classmethod
    def of(cls, operands: Operands, plan: Plan) -> Dimensions:
        q, k, v, *_ = operands
        entries = [x.shape[0] for x in jax.tree.leaves(operands)]
        (_, N, T, H), (_, K, S, _) = plan.layout.sizes(q), plan.kv_layout.sizes(k)
        if operands.pages is not None:
            K, S = k.shape[-3], operands.pages.shape[1] * k.shape[-2]
        acc = accumulator(plan.dtype)
        return cls(largest(entries), N, T, K, S, H, v.shape[-1], acc)

    @property
    def empty(self) -> bool:
        return 0 in self[:-1]


def q_tile(plan: Plan, tile: QueryTile, x: Array, dtype: np.dtype) -> Array:
    """(heads, groups * block_q, H) of x, laid out as queries."""
    heads, start = tile.heads * tile.groups, tile.q.start(tile.i)
    entry, first = tile.entry_of(x), tile.head * tile.groups
    taken = take_tile(plan.layout, x, entry, first, heads, start, tile.q.block)
    return taken.reshape(tile.heads, tile.rows, x.shape[-1]).astype(dtype)


def kv_tile(plan: Plan, tile: QueryTile, x: Array, j: Array, dtype: np.dtype) -> Array:
    """(heads, width, H) of key tile j of x, laid out as keys."""
    start, entry = tile.starts(j), tile.entry_of(x)
    if tile.wide is not None:
        heads = jnp.broadcast_to(tile.key_heads[:, None], start.shape)
        taken = take_tiles_at(plan.kv_layout, x, entry, heads, start, tile.kv.block)
        return taken.reshape(tile.heads, tile.width, x.shape[-1]).astype(dtype)
    taken = take_tile(plan.kv_layout, x, entry, tile.head, tile.heads, start, tile.kv.block)
    return taken.astype(dtype)


def query_rows(tile: QueryTile, x: Array) -> Array:
    """(heads, rows) of x (B, N, T)."""
    n, t = tile.head * tile.groups, tile.q.start(tile.i)
    size = (1, tile.heads * tile.groups, tile.q.block)
    return lax.dynamic_slice(x, (tile.entry_of(x), n, t), size).reshape(tile.heads, tile.rows)


def key_columns(tile: QueryTile, x: Array, j: Array) -> Array:
    """(heads, width) of key tile j of x (B, K, S)."""
    if tile.wide is not None:
        row = lax.dynamic_slice_in_dim(tile.of_instance(x), tile.head, tile.heads)
        return tile.of_keys_by_head(row, j)
    start = (tile.entry_of(x), tile.head, tile.kv.start(j))
    return lax.dynamic_slice(x, start, (1, tile.heads, tile.kv.block))[0]


def kept_weights(operands: Operands, plan: Plan, tile: QueryTile, j: Array) -> Array | None:
    """Dropout's factors (heads, rows, block_kv) on the probabilities of key tile j, if any."""
    if operands.dropout_key is None:
        return None
    rate, every_head = plan.dropout_rate, plan.broadcast_dropout
    return drop(operands.dropout_key, rate, every_head, tile, j, accumulator(plan.dtype))


def with_sinks(operands: Operands, tile: QueryTile, state: online.State) -> online.State:
    """The state (heads, rows) with each head's sink, if there are any."""
    if operands.sinks is None:
        return state
    sinks = tile.of_heads(operands.sinks).astype(state.m.dtype)
    return online.add_logit(state, tile.as_rows(sinks, 1)[..., 0])


def varying_as(operands: Operands, tree: C) -> C:
    """tree, varying over the mesh axes of a ``shard_map`` that any operand varies over."""
    axes = frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(operands)))

    def vary(x: Array) -> Array:
        # Sorted, since a set's order differs between processes.
        missing = tuple(sorted(axes - varying_axes(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree
