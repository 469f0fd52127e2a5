"""SuperGlue's head: matches of two sets of features by transport with a dustbin."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weft.nn.checks import check_features, check_sizes
from weft.ops.transport.log_optimal_transport import log_optimal_transport


class Matching(NamedTuple):
    """A matching of N points of x with M of y.

    Attributes:
        log_assignment: Z ``(B, N + 1, M + 1)`` of ``weft.log_optimal_transport``, differentiable.
        x_matches: ``(B, N)`` int64, the point of y that each of x has, −1 for none.
        y_matches: ``(B, M)`` int64, likewise.
        x_scores: ``(B, N)``, e^Z of each point's mutual match, 0 where there is none.
        y_scores: ``(B, M)``, likewise.
    """

    log_assignment: Tensor
    x_matches: Tensor
    y_matches: Tensor
    x_scores: Tensor
    y_scores: Tensor


class OptimalMatching(nn.Module):
    r"""Matches points by their features; what has no partner goes to a learned dustbin.

    .. math::
        S_{ij} = \langle W x_i + b, W y_j + b \rangle / \sqrt D, \qquad
        Z = \log\text{-optimal transport of } S \text{ with a dustbin of score } \alpha

    i and j match where each is the other's largest :math:`Z` outside the dustbins, and
    :math:`e^{Z_{ij}}` exceeds the threshold.

    Args:
        features: D.
        iterations: of Sinkhorn, ≥ 1.
        threshold: in [0, 1].
        device, dtype: of the parameters.

    Attributes:
        projection: ``nn.Linear(D, D)``, shared by both sides.
        dustbin_score: α ``()``, 1 to begin with.

    Shapes: x ``(B, N, D)``, y ``(B, M, D)``, lengths a pair of ``(B,)`` int64 or None; returns a
    :class:`Matching`.

    Raises:
        ValueError: sizes, shapes, iterations or threshold out of range.
        TypeError: features that are not floating-point or differ in dtype.

    Source: Sarlin et al., "SuperGlue: Learning Feature Matching with Graph Neural Networks", CVPR
    2020, sections 3.2 and 4 (100 iterations, threshold 0.2); the loss: equation 10.
    """

    def __init__(
        self,
        features: int,
        *,
        iterations: int = 100,
        threshold: float = 0.2,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(features=features, iterations=iterations)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        self.features, self.iterations, self.threshold = features, iterations, float(threshold)
        self.projection = nn.Linear(features, features, device=device, dtype=dtype)
        self.dustbin_score = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        lengths: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Matching:
        for name, features in (("x", x), ("y", y)):
            check_features(name, features, self.features)
            if features.dim() != 3 or len(features) != len(x):
                raise ValueError(
                    f"{name} must be (B, points, {self.features}), got {tuple(features.shape)}"
                )
        scores = self.projection(x) @ self.projection(y).mT / math.sqrt(self.features)
        dustbin = self.dustbin_score.to(scores.dtype)
        Z = log_optimal_transport(scores, dustbin, self.iterations, lengths)
        return Matching(Z, *mutual_matches(Z, self.threshold))

    def loss(self, log_assignment: Tensor, x_targets: Tensor, y_targets: Tensor) -> Tensor:
        """−Σ Z over true pairs and over the dustbins of points without partner, mean of the batch.

        ``x_targets`` ``(B, N)`` and ``y_targets`` ``(B, M)`` int64: the true partner, −1 for none,
        −2 for padding and points that do not count; a pair counts once, from its side of x.
        """
        N, M = x_targets.shape[1], y_targets.shape[1]
        to_column = torch.where(x_targets == -1, M, x_targets.clamp_min(0))
        of_x = log_assignment[:, :N].gather(2, to_column[..., None])[..., 0]
        of_y = log_assignment[:, N, :M]
        total = torch.where(x_targets >= -1, of_x, 0).sum(1)
        total = total + torch.where(y_targets == -1, of_y, 0).sum(1)
        return -total.mean()

    def extra_repr(self) -> str:
        return f"features={self.features}, iterations={self.iterations}, threshold={self.threshold}"


def mutual_matches(
    log_assignment: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_matches, y_matches and their scores, from Z with its dustbins."""
    inside = log_assignment[:, :-1, :-1]
    B, N, M = inside.shape
    if not N or not M:
        none = log_assignment.new_full((B, N), -1, dtype=torch.int64)
        other = log_assignment.new_full((B, M), -1, dtype=torch.int64)
        return none, other, inside.new_zeros(B, N), inside.new_zeros(B, M)
    best, column = inside.max(2)
    row = inside.argmax(1)
    mutual = row.gather(1, column) == torch.arange(N, device=row.device)
    x_scores = torch.where(mutual, best.exp(), 0)
    matched = mutual & (x_scores > threshold)
    x_matches = torch.where(matched, column, -1)
    y_mutual = column.gather(1, row) == torch.arange(M, device=row.device)
    y_scores = torch.where(y_mutual, x_scores.gather(1, row), 0)
    y_matches = torch.where(y_mutual & matched.gather(1, row), row, -1)
    return x_matches, y_matches, x_scores, y_scores
