"""Features that stay comparable when a model is replaced: losses and measures."""

from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, check_labels


class HigherOrderCompatibilityLoss(nn.Module):
    r"""Cross entropy of a fixed simplex head, joined with an alignment to the previous model.

    .. math::
        L = \lambda \, \mathrm{CE}(\text{logits}, y) + (1 - \lambda) \, \frac1N \sum_i \Big(
            -\mu \langle \hat o_i, \hat n_i \rangle
            + \log \sum_j e^{\mu \, [y_i \ne y_j] \, \langle \hat o_i, \hat n_j \rangle} \Big)

    with n and o the features of the new and of the previous model, each divided by its norm. The
    cross entropy alone aligns the means of the classes; the contrast aligns what is around them.
    Pairs of one class enter the sum with similarity 0, as in the published code, so that it is
    never empty.

    Args:
        weight: :math:`\lambda`, from 0 to 1.
        mu: scale of the similarities, > 0.

    Shapes: logits ``(N, C)``, features ``(N, D)`` of both models, labels ``(N,)`` int64, a scalar
    loss. No gradient reaches ``previous``.

    Raises:
        ValueError: shapes, labels outside the classes, a weight or scale out of range.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and
    Implications for Improved Model Replacements", CVPR 2024, equations 3 and 4.
    """

    def __init__(self, weight: float = 0.1, mu: float = 10.0):
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be from 0 to 1, got {weight}")
        if not mu > 0:
            raise ValueError(f"mu must be > 0, got {mu}")
        self.weight, self.mu = float(weight), float(mu)

    def forward(self, logits: Tensor, features: Tensor, previous: Tensor, labels: Tensor) -> Tensor:
        _check_pair(features, previous)
        check_features("logits", logits)
        if logits.dim() != 2 or len(logits) != len(features):
            raise ValueError(f"logits must be ({len(features)}, C), got {tuple(logits.shape)}")
        check_labels("labels", labels, (len(features),), logits.shape[1])
        new = F.normalize(features, dim=1)
        old = F.normalize(previous.detach(), dim=1)
        similarity = self.mu * at_least_float32(old @ new.mT)
        others = similarity.masked_fill(labels[:, None] == labels, 0)
        contrast = (others.logsumexp(1) - similarity.diagonal()).mean()
        entropy = F.cross_entropy(at_least_float32(logits), labels)
        return self.weight * entropy + (1 - self.weight) * contrast

    def extra_repr(self) -> str:
        return f"weight={self.weight}, mu={self.mu}"


def feature_distillation_loss(features: Tensor, previous: Tensor) -> Tensor:
    r"""Mean of :math:`1 - \cos(n_i, o_i)` between the features of a model and of the one before it.

    Added to the cross entropy of a :class:`weft.nn.SimplexClassifier` on the samples of the
    episodic memory, it keeps features where they were between two updates.

    Args:
        features: ``(N, D)``, of the model in training.
        previous: ``(N, D)``, of the model before; no gradient reaches it.

    Returns:
        A scalar; 0 for an empty memory.

    Raises:
        ValueError: shapes that differ.
        TypeError: features that are not floating-point.

    Source: Biondi et al., "CL2R: Compatible Lifelong Learning Representations", ACM TOMM 2022,
    the local stationarity term.
    """
    _check_pair(features, previous)
    if not len(features):
        return features.sum()
    cosine = F.cosine_similarity(at_least_float32(features), at_least_float32(previous.detach()))
    return (1 - cosine).mean()


def average_compatibility(matrix: Tensor) -> Tensor:
    r"""How many pairs of models are compatible.

    .. math::
        AC = \frac{2}{T (T - 1)} \sum_{i > j} [M_{ij} > M_{jj}]

    Args:
        matrix: ``(T, T)``: ``matrix[i, j]`` is the accuracy of queries of model i on a gallery of
            model j.

    Returns:
        A scalar in [0, 1], in the dtype of ``matrix``; 1 for a single model, which has none to
        break with.

    Raises:
        ValueError: a matrix that is not square, or empty.
        TypeError: a matrix that is not floating-point.

    Source: Biondi et al., "CoReS: Compatible Representations via Stationarity", TPAMI 2023,
    average multi-model compatibility.
    """
    _check_matrix(matrix)
    T = len(matrix)
    if T == 1:
        return matrix.new_ones(())
    compatible = (matrix > matrix.diagonal()).tril(-1)
    return compatible.sum().to(matrix.dtype) * (2 / (T * (T - 1)))


def backward_compatibility(matrix: Tensor) -> Tensor:
    r"""Mean of :math:`M_{Tj} - M_{jj}` over the models j < T: what the last update brings old
    galleries.

    Args:
        matrix: ``(T, T)`` as in :func:`average_compatibility`, T >= 2.

    Returns:
        A scalar.

    Raises:
        ValueError: a matrix that is not square, or of fewer than two models.
        TypeError: a matrix that is not floating-point.

    Source: Biondi et al., "CL2R: Compatible Lifelong Learning Representations", ACM TOMM 2022.
    """
    _check_matrix(matrix, least=2)
    return (matrix[-1] - matrix.diagonal())[:-1].mean()


def forward_compatibility(matrix: Tensor) -> Tensor:
    r"""Mean of :math:`M_{i,i-1} - M_{ii}` over the models i > 1: what a fresh gallery would add.

    Args:
        matrix: ``(T, T)`` as in :func:`average_compatibility`, T >= 2.

    Returns:
        A scalar.

    Raises:
        ValueError: a matrix that is not square, or of fewer than two models.
        TypeError: a matrix that is not floating-point.

    Source: Biondi et al., "CL2R: Compatible Lifelong Learning Representations", ACM TOMM 2022.
    """
    _check_matrix(matrix, least=2)
    return (matrix.diagonal(-1) - matrix.diagonal()[1:]).mean()


def _check_pair(features: Tensor, previous: Tensor) -> None:
    check_features("features", features)
    check_features("previous", previous)
    if features.dim() != 2:
        raise ValueError(f"features must be (N, D), got {tuple(features.shape)}")
    if previous.shape != features.shape:
        raise ValueError(f"previous must be {tuple(features.shape)}, got {tuple(previous.shape)}")


def _check_matrix(matrix: Tensor, least: int = 1) -> None:
    check_features("matrix", matrix)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < least:
        raise ValueError(f"matrix must be (T, T) with T >= {least}, got {tuple(matrix.shape)}")
