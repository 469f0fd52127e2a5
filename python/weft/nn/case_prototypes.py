"""Case-based reasoning: a classifier that sees a sample only through its distances to prototypes,
which a decoder can show."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import (
    at_least_float32,
    check_features,
    check_labels,
    check_sizes,
    full_precision,
)
from weft.ops.pairwise.distance import pairwise_distance
from weft.ops.pairwise.pairwise import pairwise


class PrototypeLayer(nn.Module):
    r"""Squared distances of features to learned prototypes.

    .. math::
        d_{ij} = \lVert z_i - p_j \rVert^2

    A ``torch.nn.Linear(num_prototypes, num_classes, bias=False)`` after it and an autoencoder
    before it make the network of the paper: whatever decodes features decodes the prototypes too,
    and a decision is a weighted sum of the distances to them. Train with
    :class:`CaseBasedLoss`.

    Args:
        in_features: D.
        num_prototypes: K.
        device, dtype: of the prototypes.

    Attributes:
        prototypes: ``(K, D)``, uniform in [0, 1) at the beginning.

    Shapes: features ``(..., D)``, distances ``(..., K)``, in float32 or wider.

    Raises:
        ValueError: sizes that are not positive, features of another size.
        TypeError: features that are not floating-point.

    Source: Li et al., "Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network
    that Explains Its Predictions", AAAI 2018, section "Network Architecture".
    """

    def __init__(self, in_features: int, num_prototypes: int, *, device=None, dtype=None):
        super().__init__()
        check_sizes(in_features=in_features, num_prototypes=num_prototypes)
        self.in_features, self.out_features = in_features, num_prototypes
        prototypes = torch.empty(num_prototypes, in_features, device=device, dtype=dtype)
        self.prototypes = nn.Parameter(prototypes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prototypes)

    def forward(self, z: Tensor) -> Tensor:
        check_features("z", z, self.in_features)
        with full_precision(z):
            rows, prototypes = same_dtype(z.reshape(-1, self.in_features), self.prototypes)
            distances = pairwise_distance(rows, prototypes)
        return distances.view(*z.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_prototypes={self.out_features}"


class CaseBasedTerms(NamedTuple):
    """``loss`` is the weighted sum of the others, each ``()``."""

    loss: Tensor
    classification: Tensor
    reconstruction: Tensor
    prototypes_to_samples: Tensor
    samples_to_prototypes: Tensor


class CaseBasedLoss(nn.Module):
    r"""The four terms that train a case-based prototype network.

    .. math::
        L = \lambda E + \lambda_{ae} \frac1N \sum_i \lVert g(z_i) - x_i \rVert^2
            + \lambda_1 R_1 + \lambda_2 R_2, \qquad
        R_1 = \frac1K \sum_j \min_i \lVert z_i - p_j \rVert^2, \quad
        R_2 = \frac1N \sum_i \min_j \lVert z_i - p_j \rVert^2

    E is the cross entropy. R1 asks that every prototype is close to some sample of the batch, so
    that it decodes into something that looks like one; R2 that every sample is close to some
    prototype, so that they cover the data. Of equal distances the first gets the gradient. The
    matrix of distances is not stored for R1 and R2.

    Args:
        classification, reconstruction, prototypes_to_samples, samples_to_prototypes: the weights
            lambda, lambda_ae, lambda_1 and lambda_2, >= 0; the defaults are those of the paper.

    Shapes: logits ``(N, C)``, labels ``(N,)`` int64, decoded and inputs ``(N, ...)`` of one shape,
    features ``(N, D)``, prototypes ``(K, D)``; a named tuple of five scalars.

    Raises:
        ValueError: negative weights, shapes that do not match, labels outside the classes, an empty
            batch.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Li et al., "Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network
    that Explains Its Predictions", AAAI 2018, section "Cost Function".
    """

    def __init__(
        self,
        classification: float = 20.0,
        reconstruction: float = 1.0,
        prototypes_to_samples: float = 1.0,
        samples_to_prototypes: float = 1.0,
    ):
        super().__init__()
        weights = {
            "classification": classification,
            "reconstruction": reconstruction,
            "prototypes_to_samples": prototypes_to_samples,
            "samples_to_prototypes": samples_to_prototypes,
        }
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"{name} must be >= 0, got {weight}")
        self.weights = weights

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        decoded: Tensor,
        inputs: Tensor,
        features: Tensor,
        prototypes: Tensor,
    ) -> CaseBasedTerms:
        check_features("logits", logits)
        if logits.dim() != 2 or not logits.numel():
            raise ValueError(f"logits must be (N, C), not empty, got {tuple(logits.shape)}")
        N, C = logits.shape
        check_labels("labels", labels, (N,), C)
        check_features("features", features)
        if features.dim() != 2 or len(features) != N:
            raise ValueError(f"features must be ({N}, D), got {tuple(features.shape)}")
        check_features("prototypes", prototypes, features.shape[1])
        if prototypes.dim() != 2 or not len(prototypes):
            raise ValueError(f"prototypes must be (K, D), got {tuple(prototypes.shape)}")
        if decoded.shape != inputs.shape or len(inputs) != N:
            raise ValueError(
                f"decoded and inputs must have one shape ({N}, ...), "
                f"got {tuple(decoded.shape)} and {tuple(inputs.shape)}"
            )
        with full_precision(features):
            z, p = same_dtype(features, prototypes)
            error = (at_least_float32(decoded) - at_least_float32(inputs)).square().sum() / N
            of_samples, of_prototypes = pairwise(
                z, p, pair="sqeuclidean", reduce="min", over="both"
            )
            terms = (
                F.cross_entropy(at_least_float32(logits), labels),
                error,
                of_prototypes.values.mean(),
                of_samples.values.mean(),
            )
        weighted = zip(self.weights.values(), terms, strict=True)
        return CaseBasedTerms(sum(weight * term for weight, term in weighted), *terms)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight}" for name, weight in self.weights.items())


def same_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes, float32 at least."""
    dtype = torch.promote_types(at_least_float32(x).dtype, at_least_float32(y).dtype)
    return x.to(dtype), y.to(dtype)
