"""Classes as mixtures of prototypes, learned to tell what belongs to no class."""

import math

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
from weft.ops.pairwise.cross_entropy import contrastive_loss
from weft.ops.transport.doubly_stochastic import doubly_stochastic


class PALMLoss(nn.Module):
    r"""PALM: features near the prototypes of their class, prototypes by moving averages.

    With unit features z and unit prototypes p, K of each class,

    .. math::
        Q &= \text{Sinkhorn}(z p^\top / \varepsilon), \qquad
        w_{ij} \propto_j Q_{ij} \, [y_i = y_j] \, [j \in \mathrm{top}_k(i)] \\
        p_j &\leftarrow \mathrm{unit}(m\, p_j + (1 - m) \textstyle\sum_i \bar w_{ij} z_i), \qquad
        \bar w_{ij} = w_{ij} / \textstyle\sum_i w_{ij} \\
        L &= -\frac1B \sum_i \Big[ \sum_j w_{ij} \frac{z_i \cdot p_j}{\tau}
            - \log \sum_j e^{z_i \cdot p_j / \tau} \Big]
            + \lambda\, L_\mathrm{proto}

    Q is the balanced assignment of the batch to the prototypes of all classes; w of the loss is of
    Q under the updated prototypes, pruned to the prototypes whose :math:`\bar w` is largest, as in
    the published code. L_proto is the supervised contrastive loss between the prototypes, at
    temperature 0.5; its gradient reaches the features through the update. Prototypes are updated
    in training mode alone.

    New features are scored by their Mahalanobis distance under one Gaussian of the unit features of
    the training set: ``MahalanobisHead(z.mean(0, keepdim=True), z.T.cov()).distances``.

    Args:
        features: D.
        classes: C.
        prototypes: K of each class; 6 in the published runs on CIFAR-100.
        top: k <= K, the prototypes of its class that a sample keeps; 5 there.
        temperature: τ > 0.
        momentum: m in [0, 1]; 0.999 there.
        proto_weight: λ >= 0.
        epsilon, iterations: of the assignment.

    Attributes:
        prototypes: ``(C K, D)``, those of class c in rows c K ... c K + K − 1.

    Shapes: features ``(B, D)``, all views of a batch, normalised here; labels ``(B,)`` int64; loss
    ``()``. In float32 or wider.

    Raises:
        ValueError: sizes, arguments out of range, shapes, labels outside the classes.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Lu et al., "Learning with Mixture of Prototypes for Out-of-Distribution Detection",
    ICLR 2024, and its published code.
    """

    prototypes: Tensor

    def __init__(
        self,
        features: int,
        classes: int,
        prototypes: int = 6,
        *,
        top: int = 5,
        temperature: float = 0.1,
        momentum: float = 0.99,
        proto_weight: float = 1.0,
        epsilon: float = 0.05,
        iterations: int = 3,
    ):
        super().__init__()
        check_sizes(features=features, classes=classes, prototypes=prototypes, top=top)
        check_sizes(iterations=iterations)
        if top > prototypes:
            raise ValueError(f"top must be <= prototypes, {prototypes}, got {top}")
        for name, value in (("temperature", temperature), ("epsilon", epsilon)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        if not proto_weight >= 0:
            raise ValueError(f"proto_weight must be >= 0, got {proto_weight}")
        self.classes, self.per_class, self.top = classes, prototypes, top
        self.temperature, self.momentum = temperature, momentum
        self.proto_weight, self.epsilon, self.iterations = proto_weight, epsilon, iterations
        start = torch.randn(classes * prototypes, features)
        self.register_buffer("prototypes", F.normalize(start, dim=1))
        of = torch.arange(classes).repeat_interleave(prototypes)
        self.register_buffer("prototype_labels", of, persistent=False)

    def assign(self, z: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        """Balanced assignments to all prototypes, of which those of the own class are kept."""
        scores = z.detach() @ prototypes.detach().T
        q = doubly_stochastic(scores, self.iterations, epsilon=self.epsilon)
        return q * (labels[:, None] == self.prototype_labels)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        check_features("features", features, self.prototypes.shape[1])
        if features.dim() != 2 or not len(features):
            raise ValueError(f"features must be (B, D) with B >= 1, got {tuple(features.shape)}")
        check_labels("labels", labels, features.shape[:1], self.classes)
        with full_precision(features):
            z = F.normalize(at_least_float32(features), dim=1)
            prototypes = self.prototypes.to(z.dtype)
            share = _unit_lines(_largest(self.assign(z, prototypes, labels), self.top), 1)
            share = _unit_lines(share, 0)
            if self.training:
                mean = share.T @ z
                prototypes = self.momentum * prototypes + (1 - self.momentum) * mean
                prototypes = F.normalize(prototypes, dim=1)
            fixed = prototypes.detach()
            kept = _largest(share, self.top) != 0
            weights = _unit_lines(self.assign(z, fixed, labels) * kept, 1)
            logits = z @ fixed.T / self.temperature
            loss = (logits.logsumexp(1) - (weights * logits).sum(1)).mean()
            if self.proto_weight:
                between = contrastive_loss(
                    prototypes, kind="supcon", labels=self.prototype_labels, temperature=0.5
                )
                loss = loss + self.proto_weight * between
            if self.training:
                self.prototypes.copy_(fixed)
        return loss

    def extra_repr(self) -> str:
        return (
            f"classes={self.classes}, prototypes={self.per_class}, top={self.top}, "
            f"temperature={self.temperature}, momentum={self.momentum}"
        )


def _largest(weights: Tensor, k: int) -> Tensor:
    """The k largest of each row, and zeros."""
    index = weights.topk(k, dim=1).indices
    return torch.zeros_like(weights).scatter(1, index, weights.gather(1, index))


def _unit_lines(weights: Tensor, dim: int) -> Tensor:
    return F.normalize(weights, p=1, dim=dim)
