"""Attention to a cache: the queries are those of the tokens that were appended last."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.typing import ArrayLike

from .._checks.numbers import known_values
from .._checks.shapes import as_floats, check_groups, check_heads, check_shape
from .._masks.base import Mask
from .any_cache import counts
from .cache import KVCache
from .cache_arguments import row_integers
from .cached import Queries, reach, to_cache
from .explicit_axes import model_axes, on_auto_axes
from .merge import merge_attention
from .options import Arrays, Options, ScoreMod, as_score_mod, check_options
from .paged import PagedKVCache
from .signature import same_arguments


def attend_arguments(
    query: ArrayLike,
    cache: KVCache | PagedKVCache,
    bias: ArrayLike | None = None,
    mask: Mask | ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    prefix: KVCache | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Array, KVCache | PagedKVCache, KVCache | None, Arrays, Options]:
    """The arguments of attention to a cache, checked."""
    (query,) = as_floats(query=query)
    _check_cache(query, cache)
    arrays = Arrays(
        bias=bias,
        mask=mask,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        score_mod=as_score_mod(score_mod, cache.keys.dtype),
    ).checked()
    if query_offset is not None:
        query_offset = row_integers("query_offset", query_offset, query.shape[0])
    arrays = arrays._replace(query_offset=query_offset)
    for name, x in {"bias": bias, "mask": mask, "score_mod": score_mod}.items():
        ring = isinstance(cache, KVCache) and cache.window is not None
        if x is not None and (prefix is not None or ring):
            what = "a window" if prefix is None else "a prefix"
            raise NotImplementedError(
                f"{name} must be None where the cache has {what}: its key axis would be that of "
                f"slots, which are no positions there; it is {type(x).__name__}"
            )
    if prefix is not None:
        _check_prefix(query, prefix, cache)
    return (
        query,
        cache,
        prefix,
        arrays,
        check_options(query, is_causal, local_window_size, block_sizes),
    )


@same_arguments(attend_arguments)
def attend_with_lse(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """``attend``, and the log-sum-exp of its scores.

    Args and Raises: as ``attend``.

    Returns:
        The output, and lse (B, N, T), natural log, float32 (float64 for a cache of float64). A row
        that may read no key has lse -inf, or its sink.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_jax import KVCache
        >>> x = jnp.ones((1, 3, 2, 8))
        >>> cache = KVCache.empty(1, 16, kv_heads=2, head_dim=8).append(x, x)
        >>> out, lse = attend_with_lse(x, cache)
        >>> lse.shape
        (1, 2, 3)
    """
    out, lse = _checked(*attend_arguments(*args, **kwargs))
    assert lse is not None
    return out, lse


@same_arguments(attend_arguments)
def attend(*args: Any, **kwargs: Any) -> Array:
    """Attention of the tokens appended last to all tokens of a cache.

    Options mean what they mean in ``flash_attention``, with these keys and values: those of the
    cache, in order of position. Few queries (up to 16, as in decoding and speculation) are
    multiplied with keys and values where they lie; more of them, as in the chunks of a prompt, go
    through tiles as in every other call.

    Args:
        query: (B, T, N, H), float. Query t is that of column t of the last ``append``. It is
            rounded to the dtype of a cache of floats.
        cache: a ``KVCache`` or ``PagedKVCache``, of B rows. Slots without a token change nothing,
            whatever they hold.
        bias: float, broadcastable to (B, N, T, S), S the slots. Not with a window or a prefix.
        mask: bool, alike, or a ``Mask``.
        scale: as ``flash_attention``.
        is_causal: a query reads the tokens up to its own. Else it reads all, as in attention to an
            encoder.
        local_window_size: as ``flash_attention``. The window of the cache holds in any case.
        query_offset: int32, a scalar or (B,): position of query 0; default: ``cache.offset``. That
            of the last token alone is ``cache.lengths - 1``.
        logits_soft_cap: as ``flash_attention``.
        sinks: as ``flash_attention``.
        alibi_slopes: as ``flash_attention``.
        score_mod: as ``flash_attention``, with the indices of query and of slot; the position of a
            query is ``q_index + cache.offset[b]``, which it may capture. Not with a window or a
            prefix.
        prefix: a cache without a window, of B rows or of one that all share, whose tokens come
            before those of ``cache``: its row's lengths count in the positions.
        block_sizes: of more than 16 queries, as ``flash_attention``.

    Returns:
        (B, T, N, Hv), dtype of query. A query that is padding is zero, as is one that may read no
        key. A query that should read a token that is not held, because the cache has overflowed or
        its ring has moved on, is NaN; lse, too.

        Derivatives in query, options, and keys and values of a cache of floats are those of
        ``flash_attention``. A cache of int8 has them straight through: those at the numbers that
        the integers stand for.

    Raises:
        ValueError: shapes, dtypes or ranges disagree, or, where it is known, a query should read a
            token that is not held. The message names the argument.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: bias, mask or score_mod with a window or a prefix.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_jax import KVCache
        >>> x = jnp.ones((1, 3, 2, 8))
        >>> cache = KVCache.empty(1, 16, kv_heads=2, head_dim=8).append(x, x)
        >>> attend(x, cache).shape
        (1, 3, 2, 8)

    References:
        [1] Dao, FlashAttention-2, 2023, Algorithm 1, https://arxiv.org/abs/2307.08691
        [2] Shazeer, Fast transformer decoding, 2019, https://arxiv.org/abs/1911.02150
    """
    query, cache, prefix, arrays, options = attend_arguments(*args, **kwargs)
    return _checked(query, cache, prefix, arrays, options._replace(lse=False))[0]


def _check_cache(query: Array, cache: Any) -> None:
    if not isinstance(cache, KVCache | PagedKVCache):
        raise TypeError(f"cache must be a KVCache or PagedKVCache; it is {type(cache).__name__}")
    (_, K, _, H), B = cache.keys.shape, cache.lengths.shape[0]
    check_shape("query", query, "(B, T, N, H) of the cache", (B, None, None, H))
    check_heads("query", query, query.shape[2:])
    check_groups("query", query.shape[2], "cache", K)
    if cache.keys.dtype == np.int8 and query.dtype == np.float64:
        raise TypeError("query must not be float64 with a cache of int8")


def _check_prefix(query: Array, prefix: Any, cache: KVCache | PagedKVCache) -> None:
    if not isinstance(prefix, KVCache):
        raise TypeError(f"prefix must be a KVCache; it is {type(prefix).__name__}")
    if prefix.window is not None:
        raise ValueError(f"prefix must have no window; it is {prefix.window}")
    (B, _, S, _), (_, K, _, H) = prefix.keys.shape, cache.keys.shape
    B, Hv = 1 if B == 1 else query.shape[0], cache.values.shape[-1]
    check_shape("prefix.keys", prefix.keys, "(B or 1, K, S, H)", (B, K, S, H))
    check_shape("prefix.values", prefix.values, "(B or 1, K, S, Hv)", (B, K, S, Hv))


def _queries(query: Array, cache: KVCache | PagedKVCache, offset: Any, options: Options) -> Queries:
    """The positions of the queries; offset: (B,), of query 0, where it is given."""
    if offset is None:
        offset, first = cache.offset, cache.begin
    else:
        first = cache.begin * 0  # the first token: there is no padding on the left
    if not options.is_causal:  # padding is unknown there
        return Queries(offset, offset, offset + query.shape[1])
    return Queries(offset, first, cache.lengths)


def _lost(
    column: Array | np.ndarray,
    cache: KVCache | PagedKVCache,
    prefix: KVCache | None,
    queries: Queries,
    options: Options,
) -> Array:
    """Which queries should read a token that is not held, bool (B, T), of JAX or of NumPy.

    column: 0..T-1.
    """
    t = queries.offset[:, None] + column[None]
    held = cache.held[:, None] if isinstance(cache, PagedKVCache) else cache.slots
    if isinstance(cache, KVCache) and cache.window is not None:
        first = cache.first[:, None]
        lost = (t - reach(cache, options)[0] < first) & (first > 0)
    elif options.is_causal:
        lost = t >= held
    else:
        lost = cache.lengths[:, None] > held
    if prefix is not None:
        lost = lost | (prefix.lengths > prefix.slots)[:, None]
    return lost & (t >= queries.first[:, None]) & (t < queries.end[:, None])


def _check_held(
    query: Array,
    cache: KVCache | PagedKVCache,
    prefix: KVCache | None,
    offset: Array | None,
    options: Options,
) -> None:
    """Where positions are known, a query that should read a token that is not held is an error."""
    of_prefix = {} if prefix is None else counts(prefix)
    values = known_values((counts(cache), of_prefix, offset))
    if values is None:
        return
    of_cache, of_prefix, offset = values
    cache = dataclasses.replace(cache, **of_cache)
    prefix = None if prefix is None else dataclasses.replace(prefix, **of_prefix)
    queries = _queries(query, cache, offset, options)
    lost = _lost(np.arange(query.shape[1], dtype=np.int32), cache, prefix, queries, options)
    if np.any(lost):
        raise ValueError(
            "cache must hold all tokens that the queries read; in rows "
            f"{np.flatnonzero(np.any(lost, axis=1)).tolist()} it does not: it has "
            f"{cache.slots} slots, and lengths {cache.lengths.tolist()}"
        )


def _checked(
    query: Array,
    cache: KVCache | PagedKVCache,
    prefix: KVCache | None,
    arrays: Arrays,
    options: Options,
) -> tuple[Array, Array | None]:
    """Attention of arguments that are checked but for the tokens that are held."""
    _check_held(query, cache, prefix, arrays.query_offset, options)
    axes, results = model_axes(query)
    if not options.lse:
        results = (results[0], None)
    attend = functools.partial(_attend, options=options)
    return on_auto_axes(attend, axes, results, query, cache, prefix, arrays)


@functools.partial(jax.jit, static_argnames="options")
def _attend(
    query: Array,
    cache: KVCache | PagedKVCache,
    prefix: KVCache | None,
    arrays: Arrays,
    options: Options,
) -> tuple[Array, Array | None]:
    queries = _queries(query, cache, arrays.query_offset, options)
    column = lax.iota(np.int32, query.shape[1])
    lost = _lost(column, cache, prefix, queries, options)
    if prefix is None:
        out, lse = to_cache(query, cache, queries, arrays, options)
    else:
        options = options._replace(lse=True)
        own = to_cache(query, cache, queries, arrays, options)
        # Its tokens come before all others. A sink counts once.
        lengths = jnp.broadcast_to(prefix.lengths, query.shape[:1])
        prefix = dataclasses.replace(prefix, lengths=lengths)
        if isinstance(cache, KVCache) and cache.window is not None:
            options = options._replace(window=(reach(cache, options)[0], None))
        arrays, options = arrays._replace(sinks=None), options._replace(is_causal=False)
        shared = to_cache(query, prefix, queries.later(lengths), arrays, options)
        out, lse = merge_attention(*zip(own, shared, strict=True))  # pyright: ignore
    out = jnp.where(lost[..., None, None], jnp.nan, out)
    return out, None if lse is None else jnp.where(lost[:, None], jnp.nan, lse)
