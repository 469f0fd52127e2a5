"""Attention layers."""

from weft.nn.attention.conv_projection import ConvProjectionAttention
from weft.nn.attention.cross_scale import (
    ClassCrossAttention,
    ClassCrossAttentionBlock,
    CrossScaleFusion,
)
from weft.nn.attention.gaussian_mask import GaussianMaskAttention, GaussianMixtureMask
from weft.nn.attention.hopfield import (
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    hopfield_energy,
    hopfield_retrieve,
)
from weft.nn.attention.polarized import PolarizedSelfAttention
<<<<<<< HEAD
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
=======
from weft.nn.attention.token_reorganization import (
    ClassAttention,
    EViTBlock,
    TokenPruning,
    prune_tokens,
)

__all__ = [
    "ClassAttention",
    "EViTBlock",
    "GaussianMaskAttention",
    "GaussianMixtureMask",
    "Hopfield",
    "HopfieldLayer",
    "HopfieldPooling",
    "PolarizedSelfAttention",
    "TokenPruning",
    "hopfield_energy",
    "hopfield_retrieve",
    "prune_tokens",
>>>>>>> 51b300d (Pruning of patches by the class token's attention, and Hopfield layers)
]
