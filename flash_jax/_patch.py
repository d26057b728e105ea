"""``jax.nn.dot_product_attention`` replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from ._dot_product_attention import dot_product_attention


@contextlib.contextmanager
def patch_jax_nn() -> Iterator[None]:
    """Within it, ``jax.nn.dot_product_attention`` is ``flash_jax.dot_product_attention``.

    A context manager, and a decorator of functions. What was there before comes back at the end,
    after exceptions too. It reaches code that looks the name up in ``jax.nn`` when it is called or
    traced: ``nnx.MultiHeadAttention`` without dropout, for example. It does not reach names from
    ``from jax.nn import dot_product_attention``; and functions under ``jax.jit`` keep, within it
    and after it, what they were traced with. The name is that of the whole process, all threads.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> with patch_jax_nn():
        ...     out = jax.nn.dot_product_attention(x, x, x, is_causal=True)
        >>> jax.nn.dot_product_attention is dot_product_attention
        False
    """
    before = jax.nn.dot_product_attention
    jax.nn.dot_product_attention = dot_product_attention
    try:
        yield
    finally:
        jax.nn.dot_product_attention = before
