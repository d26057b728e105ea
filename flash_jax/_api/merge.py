"""Merging attention over disjoint sets of keys, from outputs and log-sum-exps alone."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.shapes import accumulator, as_floats, check_rank, check_shape


def merge_attention(outputs: Sequence[ArrayLike], lses: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """Computes attention over the union of disjoint sets of keys from attention over each set.

    With lse_i the log-sum-exp of part i and lse that of all,  out = sum_i exp(lse_i - lse) out_i.
    The result is exact up to rounding. Give sinks to one part only.

    Args:
        outputs: arrays (B, T, N, H) or (T, N, H), all of one shape and float dtype.
        lses: as many arrays (B, N, T) or (N, T), all of one float dtype, from
            ``flash_attention_with_lse``.

    Returns:
        The output, of the shape and dtype of the parts, and its lse. A row that no part may read is
        zero, with lse -inf.

    Raises:
        ValueError: there is no part, or shapes or dtypes disagree; the message names the argument.
        TypeError: an argument is no sequence of float arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_jax import flash_attention_with_lse
        >>> x = jnp.ones((1, 6, 2, 8))
        >>> halves = [flash_attention_with_lse(x, y, y) for y in (x[:, :3], x[:, 3:])]
        >>> out, lse = merge_attention(*zip(*halves, strict=True))
        >>> out.shape, lse.shape
        ((1, 6, 2, 8), (1, 2, 6))

    References:
        Dao, FlashAttention-2, 2023, section 3.1, https://arxiv.org/abs/2307.08691
    """
    for name, parts in {"outputs": outputs, "lses": lses}.items():
        if not isinstance(parts, list | tuple):
            raise TypeError(
                f"{name} must be a list or tuple of arrays; it is {type(parts).__name__}"
            )
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"outputs and lses must be equally many, at least one; got {len(outputs)}, {len(lses)}"
        )
    out = as_floats(**{f"outputs[{i}]": x for i, x in enumerate(outputs)})
    lse = as_floats(**{f"lses[{i}]": x for i, x in enumerate(lses)})
    if out[0].ndim not in (3, 4):
        check_rank("outputs[0]", out[0], "(B, T, N, H) or (T, N, H)", 4)
    *B, T, N, _ = out[0].shape
    for i, (o, s) in enumerate(zip(out, lse, strict=True)):
        check_shape(f"outputs[{i}]", o, "the shape of outputs[0]", out[0].shape)
        check_shape(f"lses[{i}]", s, "(B, N, T) of outputs", (*B, N, T))
    return _merge(out, lse)


@jax.jit
def _merge(out: list[Array], lse: list[Array]) -> tuple[Array, Array]:
    all_lse = jnp.stack(lse)
    m = jnp.max(all_lse, axis=0)
    shift = jnp.where(jnp.isneginf(m), 0, m)
    weights = jnp.exp(all_lse - shift[None])
    total = jnp.sum(weights, axis=0)
    empty = total == 0
    weights = weights / jnp.where(empty, 1, total)[None]
    weights = jnp.swapaxes(weights, -1, -2)[..., None].astype(
        jnp.promote_types(accumulator(out[0].dtype), accumulator(m.dtype))
    )
    merged = jnp.sum(weights * jnp.stack(out).astype(weights.dtype), axis=0).astype(out[0].dtype)
    return merged, jnp.where(empty, -jnp.inf, shift + jnp.log(jnp.where(empty, 1, total)))
