"""Attention layers."""

from weft.nn.attention.aggregated import AggregatedAttention, LengthScaledCosineAttention
from weft.nn.attention.channel_tokens import ChannelPatchEmbedding, sample_channels
from weft.nn.attention.conv_projection import ConvProjectionAttention
from weft.nn.attention.cross_scale import (
    ClassCrossAttention,
    ClassCrossAttentionBlock,
    CrossScaleFusion,
)
from weft.nn.attention.feature_space import FeatureSpaceAttention, balanced_clusters
from weft.nn.attention.gaussian_mask import GaussianMaskAttention, GaussianMixtureMask
from weft.nn.attention.holistic import ChannelSpatialAttention, LayerAttention
from weft.nn.attention.hopfield import (
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    hopfield_energy,
    hopfield_retrieve,
)
from weft.nn.attention.interleaved import FITBlock
from weft.nn.attention.masked_cross import (
    MaskedCrossAttention,
    PrototypeCrossAttention,
    masks_from_logits,
)
from weft.nn.attention.memory_read import memory_read
from weft.nn.attention.multihead import MultiheadAttention
from weft.nn.attention.multimodal import CompositionBridge, MultiwayBlock, alignment_mask
from weft.nn.attention.neighborhood import LocalFrameAttention, NeighborhoodAttention
from weft.nn.attention.packed_tokens import PackedTokens, pack_tokens
from weft.nn.attention.polarized import PolarizedSelfAttention
from weft.nn.attention.reversed import DependencyBlock, ReversedAttention, reversed_attention
from weft.nn.attention.rewired import (
    nested_attention,
    redistributed_attention,
    shared_subject_attention,
    sink_tokens,
    style_injection_attention,
)
from weft.nn.attention.sparsifiner import ConnectivityPredictor, SparsifinerAttention
from weft.nn.attention.tnt import TNTBlock
from weft.nn.attention.token_reorganization import (
    ClassAttention,
    EViTBlock,
    TokenPruning,
    prune_tokens,
)
from weft.nn.attention.variates import InteractingLayer, InvertedBlock, InvertedForecaster
from weft.nn.attention.visual_prompts import PromptCAM, VisualQueryTuning
from weft.nn.attention.white_box import CRATEBlock, CRATEDecoderBlock, SubspaceAttention
from weft.nn.attention.window import WindowAttention

__all__ = [
    "AggregatedAttention",
    "CRATEBlock",
    "CRATEDecoderBlock",
    "ChannelPatchEmbedding",
    "ChannelSpatialAttention",
    "ClassAttention",
    "ClassCrossAttention",
    "ClassCrossAttentionBlock",
    "CompositionBridge",
    "ConnectivityPredictor",
    "ConvProjectionAttention",
    "CrossScaleFusion",
    "DependencyBlock",
    "EViTBlock",
    "FITBlock",
    "FeatureSpaceAttention",
    "GaussianMaskAttention",
    "GaussianMixtureMask",
    "Hopfield",
    "HopfieldLayer",
    "HopfieldPooling",
    "InteractingLayer",
    "InvertedBlock",
    "InvertedForecaster",
    "LayerAttention",
    "LengthScaledCosineAttention",
    "LocalFrameAttention",
    "MaskedCrossAttention",
    "MultiheadAttention",
    "MultiwayBlock",
    "NeighborhoodAttention",
    "PackedTokens",
    "PolarizedSelfAttention",
    "PromptCAM",
    "PrototypeCrossAttention",
    "ReversedAttention",
    "SparsifinerAttention",
    "SubspaceAttention",
    "TNTBlock",
    "TokenPruning",
    "VisualQueryTuning",
    "WindowAttention",
    "alignment_mask",
    "balanced_clusters",
    "hopfield_energy",
    "hopfield_retrieve",
    "masks_from_logits",
    "memory_read",
    "nested_attention",
    "pack_tokens",
    "prune_tokens",
    "redistributed_attention",
    "reversed_attention",
    "sample_channels",
    "shared_subject_attention",
    "sink_tokens",
    "style_injection_attention",
]
