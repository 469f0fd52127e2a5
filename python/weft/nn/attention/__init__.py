"""Attention layers."""

from weft.nn.attention.conv_projection import ConvProjectionAttention
from weft.nn.attention.cross_scale import (
    ClassCrossAttention,
    ClassCrossAttentionBlock,
    CrossScaleFusion,
)
from weft.nn.attention.gaussian_mask import GaussianMaskAttention, GaussianMixtureMask
from weft.nn.attention.polarized import PolarizedSelfAttention
from weft.nn.attention.tnt import TNTBlock
from weft.nn.attention.window import WindowAttention

__all__ = [
    "ClassCrossAttention",
    "ClassCrossAttentionBlock",
    "ConvProjectionAttention",
    "CrossScaleFusion",
    "GaussianMaskAttention",
    "GaussianMixtureMask",
    "PolarizedSelfAttention",
    "TNTBlock",
    "WindowAttention",
]
