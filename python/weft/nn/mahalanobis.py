"""Distances to the Gaussians of classes, and what is learned from them."""

import torch
from torch import Tensor

from weft.nn.checks import at_least_float32, check_features, check_labels, full_precision
from weft.nn.class_statistics import ClassStatistics, KeepsPrecision
from weft.nn.prototype_classifiers import squared_distances
from weft.ops.checks import values_are_checked


class MahalanobisHead(KeepsPrecision):
    r"""Squared Mahalanobis distances to class means, under one covariance or one per class.

    .. math::
        D_{bc} = (x_b - \mu_c)^\top (\Sigma_c + \epsilon I)^{-1} (x_b - \mu_c), \qquad
        \text{logit}_{bc} = -\tfrac12 D_{bc}

    With one covariance these are the logits of linear discriminant analysis with equal priors, and
    ``-head(x).amax(-1)`` scores what belongs to no class.

    Args:
        mean: ``(C, D)``.
        covariance: ``(D, D)`` for all classes, or ``(C, D, D)``; symmetric, positive
            semi-definite.
        ridge: epsilon, >= 0, in the units of the covariance.

    Attributes:
        mean: ``(C, D)``, float32 or float64, also in a model cast to half precision.
        factor: the Cholesky factor of each regularised covariance, in its shape.

    Shapes: features ``(..., D)``, distances and logits ``(..., C)``, in the dtype of the features.
    Computed in float32 or wider also under autocast; differentiable in the features.

    Raises:
        ValueError: shapes; a covariance that is not positive definite with its ridge; statistics
            that keep no covariance, or lack samples.
        TypeError: tensors that are not floating-point.

    Source: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks", NeurIPS 2018, equation 2.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, *, ridge: float = 0.0):
        super().__init__()
        check_features("mean", mean)
        check_features("covariance", covariance)
        if mean.dim() != 2 or not len(mean):
            raise ValueError(f"mean must be (C, D) with C >= 1, got {tuple(mean.shape)}")
        C, D = mean.shape
        if covariance.shape not in ((D, D), (C, D, D)):
            raise ValueError(
                f"covariance must be ({D}, {D}) or ({C}, {D}, {D}), got {tuple(covariance.shape)}"
            )
        if not ridge >= 0:
            raise ValueError(f"ridge must be >= 0, got {ridge}")
        mean, covariance = at_least_float32(mean.detach()), at_least_float32(covariance.detach())
        self.in_features, self.out_features = D, C
        self.register_buffer("mean", mean.clone())
        self.register_buffer("factor", cholesky(covariance, ridge))

    @classmethod
    def from_statistics(
        cls, statistics: ClassStatistics, *, ridge: float = 0.0, ddof: float = 1
    ) -> "MahalanobisHead":
        """The head of ``statistics`` that keep a covariance, shared or of each class."""
        if statistics.kind not in ("shared", "class"):
            raise ValueError(
                f"statistics must keep a 'shared' or 'class' covariance, got {statistics.kind!r}"
            )
        if values_are_checked(statistics.count) and int(statistics.count.min()) < 1:
            raise ValueError("statistics: every class needs a sample")
        return cls(statistics.mean, statistics.covariance(ddof), ridge=ridge)

    def distances(self, x: Tensor) -> Tensor:
        """The squared distances ``(..., C)``, >= 0."""
        check_features("x", x, self.in_features)
        with full_precision(x):
            rows = x.reshape(-1, self.in_features).to(self.mean.dtype)
            if self.factor.dim() == 2:
                # the same distances between whitened rows, by one product
                whitened, means = (
                    torch.linalg.solve_triangular(self.factor, y.mT, upper=False).mT
                    for y in (rows - self.mean.mean(0), self.mean - self.mean.mean(0))
                )
                squared = squared_distances(whitened, means)
            else:
                centered = (rows - self.mean[:, None]).mT  # (C, D, B)
                whitened = torch.linalg.solve_triangular(self.factor, centered, upper=False)
                squared = whitened.square().sum(1).mT
        return squared.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return -0.5 * self.distances(x)

    def extra_repr(self) -> str:
        kind = "shared" if self.factor.dim() == 2 else "class"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, covariance={kind!r}"
        )


def class_aware_alignment_loss(distances: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Pulls features to the Gaussian of their class and away from all others.

    .. math::
        L = \frac1B \sum_b \log \frac{D_{b y_b}}{\sum_c D_{bc}}

    Adapts a model at test time, where D are Mahalanobis distances to the class-conditional
    Gaussians of the source features and y are the predictions of the model itself. It has no
    hyper-parameter. The sum runs over all classes, that of y included.

    Args:
        distances: ``(B, C)``, > 0: :meth:`weft.nn.MahalanobisHead.distances`, with a covariance for
            each class.
        labels: ``(B,)`` int64; None: the nearest class.

    Returns:
        A scalar, at most 0; 0 for an empty batch.

    Raises:
        ValueError: shapes, labels outside the classes.
        TypeError: distances that are not floating-point, labels that are not int64.

    Source: Jung et al., "CAFA: Class-Aware Feature Alignment for Test-Time Adaptation", ICCV 2023.
    """
    check_features("distances", distances)
    if distances.dim() != 2 or not distances.shape[1]:
        raise ValueError(f"distances must be (B, C), got {tuple(distances.shape)}")
    if labels is None:
        labels = distances.argmin(1)
    check_labels("labels", labels, distances.shape[:1], distances.shape[1])
    if not len(distances):
        return distances.sum()
    wide = at_least_float32(distances)
    own = wide.gather(1, labels[:, None])[:, 0]
    return (own.log() - wide.sum(1).log()).mean()


def cholesky(covariance: Tensor, ridge: float) -> Tensor:
    """The lower factor of ``covariance + ridge I``."""
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    with full_precision(covariance):
        try:
            return torch.linalg.cholesky(covariance + ridge * identity)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"covariance is not positive definite with ridge = {ridge}: {error}"
            ) from None
