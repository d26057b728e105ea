"""Multi-head attention of Equinox, in linear memory; needs the extra ``equinox``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array

from ._frameworks.layers import attend
from ._masks.base import Mask

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "flash_jax.equinox needs Equinox: pip install -e '.[equinox]' in the checkout of flash_jax"
    ) from error

Model = TypeVar("Model")


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """``eqx.nn.MultiheadAttention`` with the same constructor, fields and leaves.

    It loads files of ``eqx.tree_serialise_leaves`` as they are. ``from_equinox`` converts a layer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = MultiheadAttention(num_heads=2, query_size=8, key=jax.random.key(0))
        >>> x = jnp.ones((5, 8))
        >>> layer(x, x, x).shape
        (5, 8)
    """

    def __call__(
        self,
        query: Array,
        key_: Array,
        value: Array,
        mask: Mask | Array | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Callable[..., tuple[Array, Array, Array]] | None = None,
    ) -> Array:
        """As ``eqx.nn.MultiheadAttention.__call__``.

        Args:
            query: (T, query_size).
            key_: (S, key_size).
            value: (S, value_size).
            mask: (T, S) or (num_heads, T, S), False masks; or a ``flash_jax.Mask``, which takes
                no memory of T x S.
            key: a PRNG key for dropout. Other probabilities are dropped than Equinox drops.
            inference: True means no dropout; default: ``self.dropout.inference``.
            deterministic: the former name of inference.
            process_heads: maps the heads of query (T, num_heads, qk_size), key (S, num_heads,
                qk_size) and value (S, num_heads, vo_size) to others of these shapes.

        Returns:
            (T, output_size). A row that may read no key is zero before the output projection
            (Equinox: the mean of value).

        Raises:
            RuntimeError: dropout is active, and there is no key.
            ValueError, TypeError: as ``flash_jax.flash_attention``.
        """
        if inference is None:
            inference = self.dropout.inference
        rate = 0.0 if (inference if deterministic is None else deterministic) else self.dropout.p
        if rate and key is None:
            raise RuntimeError(f"key must be given where dropout is active, at {rate}; it is None")
        heads = tuple(
            jax.vmap(project)(x).reshape(x.shape[0], self.num_heads, -1)
            for project, x in (
                (self.query_proj, query),
                (self.key_proj, key_),
                (self.value_proj, value),
            )
        )
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = process_heads(*heads)
            if [x.shape for x in heads] != shapes:
                raise ValueError(
                    f"process_heads must keep the shapes {shapes}; it returned "
                    f"{[x.shape for x in heads]}"
                )
        out = attend(*heads, mask=mask, dropout_rate=rate, dropout_rng=key)
        return jax.vmap(self.output_proj)(out.reshape(query.shape[0], -1))


def from_equinox(model: Model) -> Model:
    """Replaces every ``eqx.nn.MultiheadAttention`` in a model by one of this module.

    Args:
        model: a layer, or any pytree with layers in it. The new layers share the arrays of the old.
            Layers of subclasses stay what they are, those of this module among them.

    Raises:
        ValueError: the model has none, and would come back unchanged.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = eqx.nn.MultiheadAttention(num_heads=2, query_size=8, key=jax.random.key(0))
        >>> x = jnp.ones((5, 8))
        >>> bool(jnp.allclose(from_equinox(layer)(x, x, x), layer(x, x, x), atol=1e-6))
        True
    """
    if not any(map(_is_equinox, jax.tree.leaves(model, is_leaf=_is_equinox))):
        raise ValueError(
            "model must have an equinox.nn.MultiheadAttention in it, of this class itself: layers "
            f"of subclasses stay what they are; it is {type(model).__name__} without one"
        )
    return jax.tree.map(_convert, model, is_leaf=_is_equinox)


def _is_equinox(x: Any) -> bool:
    return type(x) is eqx.nn.MultiheadAttention


def _convert(x: Any) -> Any:
    if not _is_equinox(x):
        return x
    layer = object.__new__(MultiheadAttention)  # __init__ would draw weights
    for field in dataclasses.fields(x):
        object.__setattr__(layer, field.name, getattr(x, field.name))  # it is frozen
    return layer
