"""Attention over the blocks of scores that matter, which are found from few scores."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.shapes import as_floats, check_qkv
from .._masks.sparse import BlockSparseMask
from .._sparse.choice import chosen, share
from .._sparse.importance import antidiagonal, pooled
from .._sparse.mincut_mask import mincut_tiles
from .attention import flash_attention
from .sparse_arguments import Choice, check_share, checked


class SparsePrefill(NamedTuple):
    """What ``sparse_prefill`` returns.

    Attributes:
        output: (B, T, N, Hv), dtype of query.
        table: bool (B, K, T / block_q, S / block_kv), rounded up: the blocks that were kept, as
            ``BlockSparseMask`` takes them.
        density: float32: their share of all blocks, or of those that a causal query may read.
    """

    output: Array
    table: Array
    density: Array


def block_scores(
    query: ArrayLike,
    key: ArrayLike,
    *,
    method: str = "antidiagonal",
    block_sizes: tuple[int, int] = (128, 128),
    is_causal: bool = False,
    scale: ArrayLike | None = None,
    stride: int | None = None,
) -> Array:
    """Estimates how much of each row's attention falls to each block of keys, without attention.

    Args:
        query: (B, T, N, H) or (T, N, H), floats.
        key: (B, S, K, H), dtype of query.
        method: "antidiagonal": the scores of every stride-th pair, on antidiagonals, at
            1 / (2 * stride) of the operations of attention [1]; "pooled": the score of the mean
            query and the mean key of each block [2], at next to none.
        block_sizes: queries and keys per block.
        is_causal: query t reads keys 0..t.
        scale: factor on the products, a scalar; default ``1 / sqrt(H)``.
        stride: of the antidiagonals; divides both block sizes; default 16, or what divides them.

    Returns:
        (B, K, T / block_q, S / block_kv) float32, rounded up: at least 0; a row sums to 1. It is
        the mean of the query heads of each key/value head, which read the same blocks.

    Raises:
        ValueError: shapes or dtypes disagree, or an option is out of range; the message names it.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: a length is symbolic.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> block_scores(x, x, method="pooled", block_sizes=(4, 4))[0, 0].tolist()
        [[0.5, 0.5], [0.5, 0.5]]

    References:
        [1] Xu et al., XAttention, 2025, https://arxiv.org/abs/2503.16428
        [2] Jiang et al., MInference 1.0, 2024, https://arxiv.org/abs/2407.02490
    """
    options = method, block_sizes, is_causal, stride
    if method == "mincut":
        raise ValueError("method must score blocks one by one, which 'mincut' does not")
    query, key, scale, choice = checked(query, key, scale, *options)
    return _importance_of(query, key, scale, choice)


def choose_blocks(
    query: ArrayLike,
    key: ArrayLike,
    *,
    density: float | None = None,
    top_p: float | None = None,
    method: str = "antidiagonal",
    block_sizes: tuple[int, int] = (128, 128),
    is_causal: bool = False,
    scale: ArrayLike | None = None,
    stride: int | None = None,
    sinks: int = 1,
    band: int = 1,
) -> Array:
    """The table of the blocks of scores that matter most, for ``BlockSparseMask``.

    Args:
        query: as in ``block_scores``, which says how blocks are judged, and so are key,
            block_sizes, is_causal, scale and stride.
        density: which share of its blocks each row of blocks keeps, in (0, 1], rounded up: as many
            in all rows and heads, which is the fastest. Under is_causal it is a share of those that
            the row may read.
        method: as in ``block_scores``; or "mincut": blocks of the parts that ``mincut_parts``
            finds, nearest first, then those that "pooled" scores highest. It needs queries and keys
            of one length, in equal blocks, and a density, which is then of all rows together.
        top_p: in place of density, in (0, 1]: each row keeps as few blocks as have this share of
            its estimated attention.
        sinks: how many first blocks of keys are kept in any case.
        band: how many blocks from the diagonal on are kept in any case; 1: those on it.

    Returns:
        bool (B, K, T / block_q, S / block_kv), rounded up. It has no derivative.

    Raises:
        ValueError: as ``block_scores``; or not one of density and top_p is given.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: a length is symbolic.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 8, 1, 4))
        >>> table = choose_blocks(x, x, density=0.5, block_sizes=(2, 2), is_causal=True)
        >>> print(table[0, 0].astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [1 0 1 0]
         [1 0 0 1]]
    """
    options = method, block_sizes, is_causal, stride, sinks, band, density, top_p
    query, key, scale, choice = checked(query, key, scale, *options)
    check_share(choice)
    return _table_of(query, key, scale, choice)


def sparse_prefill(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    density: float | None = None,
    top_p: float | None = None,
    method: str = "antidiagonal",
    block_sizes: tuple[int, int] = (128, 128),
    is_causal: bool = True,
    scale: ArrayLike | None = None,
    stride: int | None = None,
    sinks: int = 1,
    band: int = 1,
) -> SparsePrefill:
    """Attention over the blocks of scores that matter most: ``choose_blocks``, then the mask.

    It is an approximation: what is left out is as if it were masked. With density=1 it is
    ``flash_attention``. For other options, give ``BlockSparseMask(choose_blocks(...), ...)`` to
    ``flash_attention`` as its mask.

    The cost is that of attention times the density, and of the choice: "antidiagonal" takes
    1 / (2 * stride) of the operations of full attention, 3 % by default, more of its time, and
    memory for 128 * S / stride scores per query head; "pooled" takes T S / (block_q * block_kv)
    scores per query head, and "mincut" a little more. Small blocks cost more per pair.

    Args:
        query: as in ``flash_attention``, and so are key, value and scale.
        density: as in ``choose_blocks``, and so are all that are not named here.
        is_causal: query t reads keys 0..t.

    Returns:
        ``SparsePrefill``: the output, the table of the blocks that were kept, and their share.
        Derivatives are those of attention with this table.

    Raises:
        ValueError: as ``choose_blocks`` and ``flash_attention``.
        TypeError: alike.
        NotImplementedError: a length is symbolic.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 8, 1, 4))
        >>> found = sparse_prefill(x, x, x, density=0.5, block_sizes=(2, 2))
        >>> found.output.shape, f"{found.density:.2f}"
        ((1, 8, 1, 4), '0.70')
    """
    options = method, block_sizes, is_causal, stride, sinks, band, density, top_p
    query, key, value = as_floats(query=query, key=key, value=value)
    check_qkv(query, key, value)
    q, k, factor, choice = checked(query, key, scale, *options)
    check_share(choice)
    table = _table_of(q, k, factor, choice)
    mask = BlockSparseMask(table, choice.blocks)
    output = flash_attention(query, key, value, mask=mask, scale=scale, is_causal=choice.is_causal)
    T, S = query.shape[-3], key.shape[-3]
    return SparsePrefill(output, table, share(table, T, S, choice.blocks, choice.is_causal))


@functools.partial(jax.jit, static_argnames="choice")
def _importance_of(query: Array, key: Array, scale: Array, choice: Choice) -> Array:
    if query.ndim == 3:
        return _importance_of(query[None], key[None], scale, choice)[0]
    if choice.method == "pooled":
        return pooled(query, key, choice.blocks, scale, choice.is_causal)
    return antidiagonal(query, key, choice.blocks, scale, choice.is_causal, choice.stride)


def _table_of(query: Any, key: Any, scale: Any, choice: Choice) -> Array:
    if choice.method != "mincut":
        return _ranked(query, key, scale, choice)
    density = jnp.asarray(choice.density, np.float32)  # one program for all
    return _parted(query, key, scale, density, choice._replace(density=None))


@functools.partial(jax.jit, static_argnames="choice")
def _ranked(query: Array, key: Array, scale: Array, choice: Choice) -> Array:
    importance = _importance_of(query, key, scale, choice)
    return chosen(
        importance,
        query.shape[-3],
        key.shape[-3],
        choice.blocks,
        choice.is_causal,
        choice.sinks,
        choice.band,
        choice.density,
        choice.top_p,
    )


@functools.partial(jax.jit, static_argnames="choice")
def _parted(query: Array, key: Array, scale: Array, density: Array, choice: Choice) -> Array:
    if query.ndim == 3:
        return _parted(query[None], key[None], scale, density, choice)[0]
    options = choice.is_causal, choice.sinks, choice.band
    return mincut_tiles(query, key, choice.blocks.q, density, scale, *options)
