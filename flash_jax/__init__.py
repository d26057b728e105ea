"""FlashAttention for CPUs: exact attention in linear memory, as pure JAX functions."""

from ._config import FlashAttentionConfig as FlashAttentionConfig
from ._kernels import flash_attention_forward as flash_attention_forward
from ._kernels import flash_mha as flash_mha
from ._masks import CausalMask as CausalMask
from ._masks import Mask as Mask
from ._reference import reference_attention as reference_attention
from ._schedule import BlockSchedule as BlockSchedule
from ._schedule import BlockSizes as BlockSizes
from ._schedule import block_schedule as block_schedule

__version__ = "0.1.0"
