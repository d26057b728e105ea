"""Attention over sequences that lie on several devices, inside ``shard_map``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.bind import Sizes, bind_scores
from .._checks.shapes import accumulator, check_qkv
from .._masks.arrays import ArrayMask
from .._masks.base import Mask
from .._passes import online_softmax as online
from .._passes.operands import Operands
from .._passes.plan import Ring
from .._passes.primitives import attention
from .._passes.scores import Scores
from .._tiles.jax_versions import varying_axes
from .._tiles.layout import Layout
from .._tiles.load import heads_first
from .._tiles.symbolic import known
from .attention import attention_arguments
from .batch_axis import with_batch_axis
from .options import Arrays, Options, bind_options, tiles
from .plan import plan_floats
from .signature import same_arguments
from .zigzag import needed_rounds

_LAYOUTS = "zigzag", "contiguous"


def ring_arguments(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Mask | ArrayLike | None = None,
    *,
    axis_name: str | tuple[str, ...],
    layout: str = "zigzag",
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike = 0,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    broadcast_dropout: bool = False,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Array, Array, Array, Arrays, Options, Ring]:
    """The arguments of ring attention, checked as far as no shapes of options are needed."""
    q, k, v, arrays, options = attention_arguments(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        block_sizes=block_sizes,
    )
    check_qkv(q, k, v)
    size = _size_of_axis(axis_name)
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be 'zigzag' or 'contiguous'; it is {layout!r}")
    T, S = q.shape[-3], k.shape[-3]
    for name, length in (("query", T), ("key", S)):
        if not known(length):
            raise NotImplementedError(
                f"{name} must have a length that is no symbol in ring_attention; it is {length}"
            )
        if layout == "zigzag" and length % 2:
            raise ValueError(
                f"{name} must have an even number of positions on each device for layout="
                f"'zigzag'; it has {length}. layout='contiguous' takes any"
            )
    # Where nothing goes by position, any order is contiguous.
    free = ("scale", "query_segment_ids", "key_value_segment_ids", "logits_soft_cap", "sinks")
    given = {name for name, x in arrays._asdict().items() if x is not None} - {*free}
    offset = arrays.query_offset
    known_offset = int(offset) if isinstance(offset, int | np.integer) else None
    if known_offset == 0:
        given -= {"query_offset"}
    positional = bool(given) or options.is_causal or options.window is not None
    parts = 2 if layout == "zigzag" and positional else 1
    rounds = needed_rounds(size, parts, T, S, options.is_causal, options.window, known_offset)
    return q, k, v, arrays, options, Ring(axis_name, size, parts, rounds)


def _size_of_axis(axis_name: Any) -> int:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be a mesh axis, or a tuple of them; it is {axis_name!r}")
    if missing := [name for name in names if name not in manual]:
        inside = f"here they are {', '.join(manual)}" if manual else "here is none"
        raise ValueError(
            f"axis_name must be an axis of the mesh that jax.shard_map maps over; {inside}; it is "
            f"{missing[0]!r}"
        )
    return lax.axis_size(axis_name)


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
        >>> specs = {"in_specs": P(None, "seq"), "out_specs": (P(None, "seq"), P(None, None, "seq"))}
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> out, lse = jax.jit(jax.shard_map(attend, mesh=mesh, **specs))(x, x, x)
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
        bias: float, broadcastable to (B, N, T, S) or (B, N, T, n * S) for n devices: of this
            device's queries, and of its own keys, which it follows, or of the keys of all devices,
            one device after the other.
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
        scale, is_causal, query_offset, logits_soft_cap, sinks, alibi_slopes, dropout_rate,
            broadcast_dropout, block_sizes: as in ``flash_attention``.

    Returns:
        (B, T, N, Hv), dtype of query: the rows of this device's queries.

    Raises:
        ValueError: as ``flash_attention``; axis_name is no axis of a surrounding ``shard_map``;
            layout is unknown, or its order is impossible.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: a length is symbolic.

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
    bound = bind_options(_without_scores(arrays), options, query, key)
    scores = _with_scores(bound.scores, arrays, options, query, key, ring.size)
    of_parts = (
        jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // ring.parts, *x.shape[2:]), x.dtype)
        for x in (query, key)
    )
    query_part, key_part = of_parts
    blocks, kernel = tiles(options, query_part, key_part, scores.mask is not None)
    q, k, v = (heads_first(x) for x in (_varying(query, ring), key, value))
    first = Layout.HEADS_FIRST
    plan = plan_floats(
        *(jax.ShapeDtypeStruct(_swapped(x.shape), x.dtype) for x in (query_part, key_part)),
        blocks,
        first,
        options.machine,
        options.dropout_rate,
        options.broadcast_dropout,
        kernel,
        options.lse or bound.sinks is not None,
    )
    plan = dataclasses.replace(plan, ring=ring)
    if bound.sinks is not None:
        plan = dataclasses.replace(plan, dtype=accumulator(query.dtype))
    out, lse = attention(Operands(q, k, v, scores, None, bound.dropout_key), plan)
    if bound.sinks is not None:
        assert lse is not None
        out, lse = _with_sinks(out, lse, bound.sinks)
    return jnp.swapaxes(out.astype(query.dtype), 1, 2), lse if options.lse else None


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[2], shape[1], shape[3]


def _varying(x: Array, ring: Ring) -> Array:
    """x, varying over the ring's axes as a device's own index does."""
    axes = varying_axes(lax.axis_index(ring.axis)) - varying_axes(x)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _without_scores(arrays: Arrays) -> Arrays:
    """arrays without those of single pairs."""
    mask = arrays.mask if isinstance(arrays.mask, Mask) else None
    return arrays._replace(bias=None, mask=mask)


def _with_scores(
    scores: Scores, arrays: Arrays, options: Options, query: Array, key: Array, devices: int
) -> Scores:
    """scores with the arrays of single pairs: of this device's keys, or of those of all."""
    (B, T, N, _), S = query.shape, key.shape[1]

    def bound(name: str, x: Any, spelled: str, kind: type) -> Array:
        shape = np.shape(x)
        wide = S * devices if shape and shape[-1] == S * devices else S
        return bind_scores(name, x, spelled, kind, Sizes(B, N, T, wide, options.batched))

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
