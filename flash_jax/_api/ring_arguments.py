"""The arguments of ring attention: those of attention, a mesh axis, and the order of positions."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from .._checks.shapes import check_qkv
from .._masks.base import Mask
from .._passes.plan import Ring
from .._tiles.symbolic import known
from .attention import attention_arguments
from .options import Arrays, Options, ScoreMod
from .zigzag import needed_rounds

_LAYOUTS = "zigzag", "contiguous"
# Where no other option is given, nothing goes by position.
_FREE = {
    *("scale", "logits_soft_cap", "sinks", "query_offset"),
    *("query_segment_ids", "key_value_segment_ids"),
}


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
    score_mod: ScoreMod | None = None,
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
        score_mod=score_mod,
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
    given = {name for name, x in arrays._asdict().items() if x is not None}
    in_order = options.is_causal or options.window is not None or given - _FREE
    parts = 2 if layout == "zigzag" and in_order else 1  # in any order where none is meant
    offset = arrays.query_offset
    offset = int(offset) if isinstance(offset, int | np.integer) else None
    rounds = needed_rounds(size, parts, T, S, options.is_causal, options.window, offset)
    return q, k, v, arrays, options, Ring(axis_name, size, parts, rounds)


def _size_of_axis(axis_name: Any) -> int:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    mesh = jax.sharding.get_abstract_mesh()
    manual = mesh.manual_axes
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be a mesh axis, or a tuple of them; it is {axis_name!r}")
    if missing := [name for name in names if name not in manual]:
        inside = f"here they are {', '.join(manual)}" if manual else "here is none"
        raise ValueError(
            f"axis_name must be an axis of the mesh that jax.shard_map maps over; {inside}; it is "
            f"{missing[0]!r}"
        )
    if mesh.explicit_axes:
        raise NotImplementedError(
            f"axis_name must be of a mesh whose other axes are Auto, or mapped by jax.shard_map, "
            f"too; {', '.join(mesh.explicit_axes)} is Explicit"
        )
    return lax.axis_size(axis_name)
