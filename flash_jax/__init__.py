"""FlashAttention for CPUs: exact attention in linear memory, as pure JAX functions."""

from ._attention import flash_attention as flash_attention
from ._attention import flash_attention_with_lse as flash_attention_with_lse
from ._attention_int8 import flash_attention_int8 as flash_attention_int8
from ._attention_int8 import flash_attention_int8_with_lse as flash_attention_int8_with_lse
from ._config import FlashAttentionConfig as FlashAttentionConfig
from ._dot_product_attention import dot_product_attention as dot_product_attention
from ._flax import linen_attention_fn as linen_attention_fn
from ._flax import nnx_attention_fn as nnx_attention_fn
from ._kernels import flash_attention_forward as flash_attention_forward
from ._kernels import flash_attention_forward_i8 as flash_attention_forward_i8
from ._kernels import flash_mha as flash_mha
from ._kernels import flash_mha_i8 as flash_mha_i8
from ._masks import CausalMask as CausalMask
from ._masks import LengthMask as LengthMask
from ._masks import Mask as Mask
from ._masks import PredicateMask as PredicateMask
from ._masks import PrefixMask as PrefixMask
from ._masks import SegmentMask as SegmentMask
from ._masks import WindowMask as WindowMask
from ._merge import merge_attention as merge_attention
from ._patch import patch_jax_nn as patch_jax_nn
from ._quantization import QuantizedArray as QuantizedArray
from ._quantization import dequantize as dequantize
from ._quantization import quantize as quantize
from ._reference import reference_attention as reference_attention
from ._schedule import BlockSchedule as BlockSchedule
from ._schedule import block_schedule as block_schedule
from ._shapes import BlockSizes as BlockSizes
from ._tune import tune as tune

__version__ = "0.1.0"
