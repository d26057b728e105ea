"""Multi-head attention of Haiku, in linear memory; needs the extra ``haiku``."""

from __future__ import annotations

from jax import Array

from ._frameworks.layers import attend
from ._masks.base import Mask

try:
    import haiku as hk
except ImportError as error:
    raise ImportError(
        "flash_jax.haiku needs Haiku: pip install -e '.[haiku]' in the checkout of flash_jax"
    ) from error


class MultiHeadAttention(hk.MultiHeadAttention):
    """``hk.MultiHeadAttention`` with the same constructor, and parameters of the same names.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> @hk.transform
        ... def model(x):
        ...     layer = MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())
        ...     return layer(x, x, x)
        >>> x = jnp.ones((3, 5, 8))
        >>> params = model.init(jax.random.key(0), x)
        >>> model.apply(params, None, x).shape
        (3, 5, 8)
    """

    def __call__(
        self, query: Array, key: Array, value: Array, mask: Mask | Array | None = None
    ) -> Array:
        """As ``hk.MultiHeadAttention.__call__``.

        Args:
            query: (..., T, Dq), any number of batch axes.
            key: (..., S, Dk).
            value: (..., S, Dv).
            mask: of any dtype, broadcastable to (..., num_heads, T, S), 0 masks; or a
                ``flash_jax.Mask``, which sees the batch axes as one and takes no memory of T x S.

        Returns:
            (..., T, model_size). A row that may read no key is zero before the output
            projection (Haiku: the mean of value).

        Raises:
            ValueError, TypeError: as ``flash_jax.flash_attention``.
        """

        def linear(size: int, name: str | None = None) -> hk.Linear:
            return hk.Linear(
                size, w_init=self.w_init, with_bias=self.with_bias, b_init=self.b_init, name=name
            )

        def heads(x: Array, size: int, name: str) -> Array:
            y = linear(self.num_heads * size, name)(x)
            return y.reshape(*x.shape[:-1], self.num_heads, size)

        out = attend(
            heads(query, self.key_size, "query"),
            heads(key, self.key_size, "key"),
            heads(value, self.value_size, "value"),
            mask=mask,
        )
        return linear(self.model_size)(out.reshape(*out.shape[:-2], -1))
