"""Small layers of Flax, with an attention_fn."""

import numpy as np
import pytest
from flax import linen, nnx

from flash_jax import linen_attention_fn, nnx_attention_fn

B, T, S, N, H, D = 2, 7, 11, 4, 5, 13
EPS = np.finfo(np.float32).eps
BOTH = pytest.mark.parametrize("attention_fn", [nnx_attention_fn, linen_attention_fn])


def nnx_layer(attention_fn=nnx.dot_product_attention, **options):
    return nnx.MultiHeadAttention(
        N, D, N * H, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(0), **options
    )


def linen_layer(attention_fn=linen.dot_product_attention, **options):
    return linen.MultiHeadDotProductAttention(
        N, qkv_features=N * H, attention_fn=attention_fn, **options
    )
