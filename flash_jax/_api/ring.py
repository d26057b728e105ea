"""Attention over sequences that lie on several devices, inside ``shard_map``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from .._checks.bind import Sizes, bind_scores
from .._checks.shapes import accumulator
from .._masks.arrays import ArrayMask
from .._masks.base import Mask
from .._passes import online_softmax as online
from .._passes.operands import Operands
from .._passes.plan import Ring
from .._passes.primitives import attention
from .._passes.scores import Scores
from .._tiles.heads_first import heads_first
from .._tiles.jax_versions import varying_axes
from .._tiles.layout import Layout
from .batch_axis import with_batch_axis
from .options import Arrays, Options, bind_options, tiles
from .plan import plan_floats
from .ring_arguments import ring_arguments
from .signature import same_arguments


@same_arguments(ring_arguments)
def ring_attention_with_lse(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """``ring_attention``, and the log-sum-exp of its scores.

    Args and Raises: as ``ring_attention``.

    Returns:
        The output, and lse (B, N, T) of this device's queries over the keys of all devices, as
        ``flash_attention_with_lse`` gives them.

    Example:
        >>> import jax, functools, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> attend = functools.partial(ring_attention_with_lse, axis_name="seq", is_causal=True)
        >>> spec, of_lse = P(None, "seq"), P(None, None, "seq")
        >>> ring = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=(spec, of_lse))
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> out, lse = jax.jit(ring)(x, x, x)
        >>> lse.shape
        (1, 2, 4)
    """
    out, lse = _attention_of_ring(*ring_arguments(*args, **kwargs))
    assert lse is not None
    return out, lse


@same_arguments(ring_arguments)
def ring_attention(*args: Any, **kwargs: Any) -> Array:
    """Attention over a sequence that lies on several devices, inside ``jax.shard_map``.

    Each device has its own part of the queries, keys and values. Keys travel round the devices,
    and every query meets all of them [1]. A device needs memory for its own part and one more, in
    the forward and in the backward pass, forward mode and Hessian-vector products included. The
    result is that of ``flash_attention`` of the whole sequences, and so are the derivatives.

    Args:
        query: (B, T, N, H) or (T, N, H): T of the queries, equally many on each device.
        key: (B, S, K, H): S of the keys, equally many on each device; S may differ from T.
        value: (B, S, K, Hv).
        bias: float, broadcastable to (B, N, 1, S), which is of this device's keys and travels with
            them; or to (B, N, T, n * S) for n devices, which is of this device's queries and of all
            keys, one device's after the other's.
        mask: bool, alike; or a ``Mask``, whose offsets and lengths are those of the whole
            sequences, and whose segment ids are those of this device.
        axis_name: the mesh axis that the sequences are divided over, or a tuple of axes.
        layout: the order of the positions. "zigzag": as ``to_zigzag`` brings them, which gives all
            devices equal work under a causal mask; T and S must be even. "contiguous": in order.
        query_seq_lengths: int32 (B,): of the whole sequences, as all lengths and offsets.
        key_value_seq_lengths: int32 (B,).
        query_segment_ids: integers (B, T) or (T,): of this device's queries.
        key_value_segment_ids: integers (B, S) or (S,): of this device's keys.
        local_window_size: as in ``flash_attention``. With a query_offset that is known at trace
            time, rounds whose keys no device needs are left out, and nothing is sent in them.
        dropout_rng: as in ``flash_attention``: the same probabilities are dropped as there, by the
            positions t and s in the whole sequences.
        scale: as in ``flash_attention``, and so are all that are not named here.

    Returns:
        (B, T, N, Hv), dtype of query: the rows of this device's queries.

    Raises:
        ValueError: as ``flash_attention``; axis_name is no axis of a surrounding ``shard_map``;
            layout is unknown, or its order is impossible.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: a length is symbolic, or ``shard_map`` leaves an axis of the mesh
            Explicit.

    Example:
        >>> import jax, functools, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from flash_jax import to_zigzag
        >>> mesh = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> attend = functools.partial(ring_attention, axis_name="seq", is_causal=True)
        >>> spec = P(None, "seq")  # the devices' parts, one after the other
        >>> ring = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))
        >>> x = to_zigzag(jnp.ones((1, 4, 2, 8)), 1)
        >>> ring(x, x, x).shape
        (1, 4, 2, 8)

    References:
        [1] Liu et al., Ring attention, 2023, https://arxiv.org/abs/2310.01889
    """
    *arrays, options, ring = ring_arguments(*args, **kwargs)
    return _attention_of_ring(*arrays, options._replace(lse=False), ring)[0]


@functools.partial(jax.jit, static_argnames=("options", "ring"))
def _attention_of_ring(
    query: Array, key: Array, value: Array, arrays: Arrays, options: Options, ring: Ring
) -> tuple[Array, Array | None]:
    return with_batch_axis(_attend, query, key, value, arrays, options, ring)


def _attend(
    query: Array, key: Array, value: Array, arrays: Arrays, options: Options, ring: Ring
) -> tuple[Array, Array | None]:
    of_pairs = arrays
    if not isinstance(arrays.mask, Mask):
        arrays = arrays._replace(mask=None)
    bound = bind_options(arrays._replace(bias=None), options, query, key, ring.size)
    scores = _with_pairs(bound.scores, of_pairs, options, query, key, ring.size)
    q, k, v = (heads_first(x) for x in (_varying(query, ring), key, value))
    of_part = _part(query, 1, ring), _part(key, 1, ring)
    blocks, kernel = tiles(bound.given, options.problem(*of_part, scores.mask is not None))
    plan = plan_floats(
        _part(q, 2, ring),
        _part(k, 2, ring),
        blocks,
        Layout.HEADS_FIRST,
        options.machine,
        options.dropout_rate,
        options.broadcast_dropout,
        kernel,
        options.lse or bound.sinks is not None,
    )
    dtype = query.dtype if bound.sinks is None else accumulator(query.dtype)
    plan = dataclasses.replace(plan, dtype=np.dtype(dtype), ring=ring)
    out, lse = attention(Operands(q, k, v, scores, None, bound.dropout_key), plan)
    if bound.sinks is not None and lse is not None:
        out, lse = _with_sinks(out, lse, bound.sinks)
    return jnp.swapaxes(out.astype(query.dtype), 1, 2), lse if options.lse else None


def _part(x: Array, axis: int, ring: Ring) -> jax.ShapeDtypeStruct:
    """The shape of a contiguous part of x, whose positions are that axis."""
    shape = list(x.shape)
    shape[axis] //= ring.parts
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _varying(x: Array, ring: Ring) -> Array:
    """x, varying over the ring's axes as a device's own index does."""
    axes = varying_axes(lax.axis_index(ring.axis)) - varying_axes(x)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _with_pairs(
    scores: Scores, arrays: Arrays, options: Options, query: Array, key: Array, devices: int
) -> Scores:
    """scores with bias and mask by pairs: of this device's keys, or of those of all devices."""
    (B, T, N, _), S = query.shape, key.shape[1]

    def bound(name: str, x: Any, spelled: str, kind: type) -> Array:
        of_all = np.shape(x)[-1:] == (S * devices,)
        sizes = Sizes(B, N, T, S * devices if of_all else S, options.batched)
        x = bind_scores(name, x, spelled, kind, sizes)
        if x.shape[2] != 1 and x.shape[3] not in (1, S * devices):
            raise ValueError(
                f"{name} must have the keys of all devices, {S * devices}, where it has an axis of "
                f"queries; its shape is {x.shape}"
            )
        return x

    if arrays.bias is not None:
        scores = scores._replace(bias=bound("bias", arrays.bias, "floats", jnp.floating))
    if arrays.mask is not None and not isinstance(arrays.mask, Mask):
        mask = ArrayMask(bound("mask", arrays.mask, "bool", np.bool_))
        scores = scores._replace(mask=mask if scores.mask is None else scores.mask & mask)
    return scores


def _with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """out (B, N, T, Hv) and lse (B, N, T) with one more logit per head, (B or 1, N)."""
    state = online.State(lse, (~jnp.isneginf(lse)).astype(lse.dtype), out)
    sinks = jnp.broadcast_to(sinks[..., None], lse.shape)
    return online.finish(online.add_logit(state, sinks))
