"""weft: fused kernels for representation learning. ``python -m weft`` shows what runs here."""

from weft import integrations, masks, native, nn, optim, transport  # native loads the libraries
from weft.dispatch import use
from weft.integrations.patching import patch
from weft.ops.attention.attention import attention
from weft.ops.attention.biases import DistanceBias, LowRankBias, RelativeBias
from weft.ops.attention.relative_bias import relative_bias
from weft.ops.attention.varlen import attention_varlen
from weft.ops.attention.window import window_attention
from weft.ops.checks import check_values
from weft.ops.pairwise.cross_entropy import contrastive_loss, linear_cross_entropy
from weft.ops.pairwise.distance import pairwise_distance
from weft.ops.pairwise.grassmann_step import grassmann_step, grassmann_step_
from weft.ops.pairwise.hamming_topk import hamming_topk, pack_bits
from weft.ops.pairwise.masks import PairMask
from weft.ops.pairwise.nearest import nearest
from weft.ops.pairwise.pairwise import pairwise
from weft.ops.pairwise.segment_max import maxsim, prototype_similarity
from weft.ops.pairwise.subspace_logits import subspace_logits
from weft.ops.pairwise.subspace_project import subspace_project
from weft.ops.stats.moments import SegmentStats
from weft.ops.stats.segment_stats import segment_stats
from weft.ops.stats.whitening import Whitening, whitening
from weft.ops.transport.conditional_transport import ConditionalPlans, conditional_transport
from weft.ops.transport.doubly_stochastic import doubly_stochastic
from weft.ops.transport.log_optimal_transport import log_optimal_transport
from weft.ops.transport.progressive_partial_transport import progressive_partial_transport
from weft.ops.transport.result import NotConverged
from weft.ops.transport.sinkhorn import sinkhorn
from weft.ops.transport.sinkhorn_divergence import sinkhorn_divergence
from weft.ops.transport.sinkhorn_points import sinkhorn_points
from weft.optim.manifold import ManifoldParameter

__all__ = [
    "ConditionalPlans",
    "DistanceBias",
    "LowRankBias",
    "ManifoldParameter",
    "NotConverged",
    "PairMask",
    "RelativeBias",
    "SegmentStats",
    "Whitening",
    "attention",
    "attention_varlen",
    "check_values",
    "conditional_transport",
    "contrastive_loss",
    "doubly_stochastic",
    "grassmann_step",
    "grassmann_step_",
    "hamming_topk",
    "integrations",
    "linear_cross_entropy",
    "log_optimal_transport",
    "masks",
    "maxsim",
    "native",
    "nearest",
    "nn",
    "optim",
    "pack_bits",
    "pairwise",
    "pairwise_distance",
    "patch",
    "progressive_partial_transport",
    "prototype_similarity",
    "relative_bias",
    "segment_stats",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
    "subspace_logits",
    "subspace_project",
    "transport",
    "use",
    "whitening",
    "window_attention",
]
