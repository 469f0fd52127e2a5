"""Layers and losses."""

from weft.nn.attention import (
    AggregatedAttention,
    ClassAttention,
    ClassCrossAttention,
    ClassCrossAttentionBlock,
    ConvProjectionAttention,
    CrossScaleFusion,
    DependencyBlock,
    EViTBlock,
    FeatureSpaceAttention,
    GaussianMaskAttention,
    GaussianMixtureMask,
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    LengthScaledCosineAttention,
    LocalFrameAttention,
    MaskedCrossAttention,
    MultiheadAttention,
    NeighborhoodAttention,
    PolarizedSelfAttention,
    PromptCAM,
    PrototypeCrossAttention,
    ReversedAttention,
    TNTBlock,
    TokenPruning,
    VisualQueryTuning,
    WindowAttention,
    balanced_clusters,
    hopfield_energy,
    hopfield_retrieve,
    masks_from_logits,
    memory_read,
    prune_tokens,
    reversed_attention,
)
from weft.nn.case_prototypes import CaseBasedLoss, PrototypeLayer
from weft.nn.class_statistics import ClassStatistics
from weft.nn.compatibility import (
    HigherOrderCompatibilityLoss,
    average_compatibility,
    backward_compatibility,
    feature_distillation_loss,
    forward_compatibility,
)
from weft.nn.component_classifiers import RBFClassifier, probability_margin_loss
from weft.nn.contrastive import CMCLoss, ContrastiveLoss, ConVIRTLoss, PatchNCELoss, SupConLoss
from weft.nn.fixed_classifiers import ETFClassifier, SimplexClassifier
from weft.nn.grassmann import GrassmannClassifier
from weft.nn.hyperbolic import PoincareClassifier, PoincareLinear
from weft.nn.incremental import (
    logit_normalized_cross_entropy,
    sample_class_features,
    slow_learner_groups,
    translate_features,
)
from weft.nn.mahalanobis import MahalanobisHead, class_aware_alignment_loss
from weft.nn.nadaraya_watson import NadarayaWatsonHead
from weft.nn.orthogonal import (
    BasisTransformation,
    OrthogonalCompatibleLayer,
    backward_compatible_loss,
    orthogonal_linear,
)
from weft.nn.partial_fc import PartialFC
from weft.nn.pixel_propagation import PixelConsistencyLoss, PixelPropagation
from weft.nn.probabilistic import ProbabilisticEmbeddingLoss
from weft.nn.projections import (
    ConceptProjection,
    concept_basis,
    knn_anomaly_score,
    prompt_differences,
    remove_directions,
)
from weft.nn.protopnet import ProtoPNetHead, ProtoPNetLoss
from weft.nn.prototype_classifiers import (
    CosineClassifier,
    NearestMeanClassifier,
    TEENClassifier,
    calibrate_prototypes,
)
from weft.nn.relative import InvarianceProduct, RelativeRepresentation
from weft.nn.st_protopnet import STProtoPNetHead, STProtoPNetLoss
from weft.nn.triplet import TripletLoss
from weft.nn.vector_quantizer import VectorQuantizer
from weft.nn.visual_words import VisualWordPredictor, VisualWords

__all__ = [
    "AggregatedAttention",
    "BasisTransformation",
    "CMCLoss",
    "CaseBasedLoss",
    "ClassAttention",
    "ClassCrossAttention",
    "ClassCrossAttentionBlock",
    "ClassStatistics",
    "ConVIRTLoss",
    "ConceptProjection",
    "ContrastiveLoss",
    "ConvProjectionAttention",
    "CosineClassifier",
    "CrossScaleFusion",
    "DependencyBlock",
    "ETFClassifier",
    "EViTBlock",
    "FeatureSpaceAttention",
    "GaussianMaskAttention",
    "GaussianMixtureMask",
    "GrassmannClassifier",
    "HigherOrderCompatibilityLoss",
    "Hopfield",
    "HopfieldLayer",
    "HopfieldPooling",
    "InvarianceProduct",
    "LengthScaledCosineAttention",
    "LocalFrameAttention",
    "MahalanobisHead",
    "MaskedCrossAttention",
    "MultiheadAttention",
    "NadarayaWatsonHead",
    "NearestMeanClassifier",
    "NeighborhoodAttention",
    "OrthogonalCompatibleLayer",
    "PartialFC",
    "PatchNCELoss",
    "PixelConsistencyLoss",
    "PixelPropagation",
    "PoincareClassifier",
    "PoincareLinear",
    "PolarizedSelfAttention",
    "ProbabilisticEmbeddingLoss",
    "PromptCAM",
    "ProtoPNetHead",
    "ProtoPNetLoss",
    "PrototypeCrossAttention",
    "PrototypeLayer",
    "RBFClassifier",
    "RelativeRepresentation",
    "ReversedAttention",
    "STProtoPNetHead",
    "STProtoPNetLoss",
    "SimplexClassifier",
    "SupConLoss",
    "TEENClassifier",
    "TNTBlock",
    "TokenPruning",
    "TripletLoss",
    "VectorQuantizer",
    "VisualQueryTuning",
    "VisualWordPredictor",
    "VisualWords",
    "WindowAttention",
    "average_compatibility",
    "backward_compatibility",
    "backward_compatible_loss",
    "balanced_clusters",
    "calibrate_prototypes",
    "class_aware_alignment_loss",
    "concept_basis",
    "feature_distillation_loss",
    "forward_compatibility",
    "hopfield_energy",
    "hopfield_retrieve",
    "knn_anomaly_score",
    "logit_normalized_cross_entropy",
    "masks_from_logits",
    "memory_read",
    "orthogonal_linear",
    "probability_margin_loss",
    "prompt_differences",
    "prune_tokens",
    "remove_directions",
    "reversed_attention",
    "sample_class_features",
    "slow_learner_groups",
    "translate_features",
]
