"""FlashAttention for CPUs: exact attention in linear memory, as pure JAX functions."""

from ._api.attention import flash_attention as flash_attention
from ._api.attention import flash_attention_with_lse as flash_attention_with_lse
from ._api.attention_int8 import flash_attention_int8 as flash_attention_int8
from ._api.attention_int8 import flash_attention_int8_with_lse as flash_attention_int8_with_lse
from ._api.config import FlashAttentionConfig as FlashAttentionConfig
from ._api.dot_product_attention import dot_product_attention as dot_product_attention
from ._api.kernels import flash_attention_forward as flash_attention_forward
from ._api.kernels import flash_attention_forward_i8 as flash_attention_forward_i8
from ._api.kernels import flash_mha as flash_mha
from ._api.kernels import flash_mha_i8 as flash_mha_i8
from ._api.merge import merge_attention as merge_attention
from ._api.patch import patch_jax_nn as patch_jax_nn
from ._api.reference import reference_attention as reference_attention
from ._api.tune import tune as tune
from ._formats.quantized import QuantizedArray as QuantizedArray
from ._formats.quantized import dequantize as dequantize
from ._formats.quantized import quantize as quantize
from ._frameworks.flax import linen_attention_fn as linen_attention_fn
from ._frameworks.flax import nnx_attention_fn as nnx_attention_fn
from ._masks.base import Mask as Mask
from ._masks.positions import CausalMask as CausalMask
from ._masks.positions import LengthMask as LengthMask
from ._masks.positions import PredicateMask as PredicateMask
from ._masks.positions import PrefixMask as PrefixMask
from ._masks.positions import WindowMask as WindowMask
from ._masks.segments import SegmentMask as SegmentMask
from ._masks.view import BlockSchedule as BlockSchedule
from ._masks.view import block_schedule as block_schedule
from ._tiles.tile import BlockSizes as BlockSizes

__version__ = "0.1.0"
