"""How much blocks of positions have to do with one another: an affinity of n x n blocks.

The mean of a block's queries and the mean of its keys stand for the block. Means of many positions
lie near the mean of all, and what they have in common says nothing; the cosine of what is left is
high where two blocks are of one kind. It finds where one text ends and another begins better than
the scores of the means do, whose softmax is nearly flat.

Cost: O(T N H) for the means, O(n^2 N H) for the affinity; of (T, T) nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.numbers import as_scale, check_bool, positive_integer
from .._checks.shapes import as_floats, check_groups, check_rank, check_shape

KERNELS = ("cosine", "softmax", "exp")


def block_affinity(
    query: ArrayLike,
    key: ArrayLike,
    block_size: int = 64,
    *,
    kernel: str = "cosine",
    scale: float | Array | None = None,
    is_causal: bool = False,
    per_head: bool = False,
) -> Array:
    """How much each block of a sequence has to do with each other block.

    Args:
        query: (B, T, N, H), or (T, N, H); float32, bfloat16, float16 or float64.
        key: (B, T, K, H), or (T, K, H), dtype of query, K dividing N.
        block_size: positions per block; the last block may be shorter.
        kernel: of the means q_i and k_i of blocks,

            - ``"cosine"``: the positive part of the mean of cos(q_i, q_j) and cos(k_i, k_j), less
              the means over all blocks: are the blocks of one kind? For ``mincut_parts``.
            - ``"softmax"``: softmax over j of scale * q_i . k_j: does block i read block j? For
              landmarks.
            - ``"exp"``: exp(scale * q_i . k_j), relative to the largest of a head.
        scale: factor on the scores of ``"softmax"`` and ``"exp"``; default ``1 / sqrt(H)``.
        is_causal: with ``"softmax"`` and ``"exp"``, block i reads no block j > i: those are 0.
        per_head: whether each key/value head has its own; else they are of all heads.

    Returns:
        float32 (B, 1, n, n), or (B, K, n, n) if ``per_head``, n = T / block_size rounded up;
        without B where query has none. Entries are >= 0.

    Raises:
        ValueError: shapes or dtypes disagree, the kernel is not known, or an option is given to
            ``"cosine"``, which has no scores.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (1, 256, 2, 8))
        >>> block_affinity(x, x).shape
        (1, 1, 4, 4)
    """
    query, key = as_floats(query=query, key=key)
    _check(query, key)
    block_size = positive_integer("block_size", block_size)
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; it is {kernel!r}")
    is_causal, per_head = check_bool("is_causal", is_causal), check_bool("per_head", per_head)
    if kernel == "cosine" and (scale is not None or is_causal):
        given = "scale" if scale is not None else "is_causal"
        raise ValueError(f"{given} must not be given with kernel='cosine', which has no scores")
    scale = query.shape[-1] ** -0.5 if scale is None else as_scale("scale", scale)
    x = jnp.asarray(scale, np.float32)
    if query.ndim == 3:
        return _affinity(query[None], key[None], x, block_size, kernel, is_causal, per_head)[0]
    return _affinity(query, key, x, block_size, kernel, is_causal, per_head)


def _check(query: Array, key: Array) -> None:
    if query.ndim not in (3, 4):
        check_rank("query", query, "(B, T, N, H) or (T, N, H)", 4)
    b = ("B of query, ", *query.shape[:1]) if query.ndim == 4 else ("",)
    expected = (*b[1:], query.shape[-3], None, query.shape[-1])
    check_shape("key", key, f"({b[0]}T of query, K, H of query)", expected)
    check_groups("query", query.shape[-2], "key", key.shape[-2])
    if 0 in query.shape:
        raise ValueError(f"query must have no empty axis; its shape is {query.shape}")


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _affinity(
    query: Array, key: Array, scale: Array, block: int, kernel: str, causal: bool, per_head: bool
) -> Array:
    q, k = block_means(query, block), block_means(key, block)
    B, n, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, n, K, N // K, H)
    if kernel == "cosine":
        return jnp.maximum((_cosines(q, per_head) + _cosines(k[:, :, :, None], per_head)) / 2, 0)
    s = scale * jnp.einsum("bikgh,bjkh->bkgij", q, k, precision=lax.Precision.HIGHEST)
    if causal:
        s = jnp.where(jnp.tri(n, dtype=bool), s, np.float32(-jnp.inf))
    if kernel == "softmax":
        p = jax.nn.softmax(s, axis=-1)
    else:
        p = jnp.exp(s - jnp.max(s, axis=(-2, -1), keepdims=True))
    return jnp.mean(p, axis=2) if per_head else jnp.mean(p, axis=(1, 2))[:, None]


def block_means(x: Array, block: int) -> Array:
    """(B, n, N, H) float32: the means of blocks of x (B, T, N, H)."""
    B, T, N, H = x.shape
    n = -(-T // block)
    x = jnp.pad(x, ((0, 0), (0, n * block - T), (0, 0), (0, 0)))
    total = jnp.sum(x.reshape(B, n, block, N, H), axis=2, dtype=np.float32)
    count = np.minimum(block, T - block * np.arange(n)).astype(np.float32)
    return total / count.reshape(1, n, 1, 1)


def _cosines(x: Array, per_head: bool) -> Any:
    """(B, K or 1, n, n) of x (B, n, K, G, H): cosines of blocks, less the mean block."""
    B, n, K, _, _ = x.shape
    x = x - jnp.mean(x, axis=1, keepdims=True)
    x = x.reshape(B, n, K if per_head else 1, -1)
    norm = jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1)
    return jnp.einsum("bikh,bjkh->bkij", x, x, precision=lax.Precision.HIGHEST)
