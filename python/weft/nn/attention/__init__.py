"""Attention layers."""

from weft.nn.attention.gaussian_mask import GaussianMaskAttention, GaussianMixtureMask
from weft.nn.attention.polarized import PolarizedSelfAttention

__all__ = ["GaussianMaskAttention", "GaussianMixtureMask", "PolarizedSelfAttention"]
