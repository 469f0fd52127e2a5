"""Probabilistic embeddings: an item is a distribution, and matches by the chance of its samples."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weft.nn.checks import at_least_float32, check_features, full_precision

PAIRS_AT_A_TIME = 1 << 20


class ProbabilisticTerms(NamedTuple):
    """``loss`` is the weighted sum of the others, each ``()``."""

    loss: Tensor
    matching: Tensor
    uniformity: Tensor
    kl: Tensor


class ProbabilisticEmbeddingLoss(nn.Module):
    r"""Soft contrast between items that are given by samples of their distributions.

    .. math::
        p_{ij} = \frac{1}{J^2} \sum_{k, l} \sigma \big( 2 (b - a \, d(x_i^k, y_j^l)) \big), \quad
        d(x, y) = \sqrt{\lVert x - y \rVert^2 + 10^{-6}}, \qquad
        \text{matching} = -2 \sum_i \Big( \log p_{ii} + \sum_{j \ne i} \log (1 - p_{ij}) \Big)

    .. math::
        L = \text{matching} + \lambda_u \log \mathop{\mathrm{mean}}_{z \ne z'}
            e^{-2 \lVert z - z' \rVert^2} - \frac{\lambda_{kl}}{2} \sum
            \big( 1 + v - \mu^2 - e^v \big)

    The scale a and the shift b are learned. Items i of x and y match; the factor 2 counts both
    directions. The uniformity runs over the pairs of all samples z of x and y, the KL divergence to
    the standard normal over both sides, with :math:`\mu` the mean of an item's samples and v the
    logarithm of its variance. Pairs of samples are formed for a block of items at a time and again
    in the backward.

    Args:
        scale, shift: a > 0 and b at the beginning.
        uniformity: :math:`\lambda_u` >= 0.
        kl: :math:`\lambda_{kl}` >= 0; with it the log-variances must be given.

    Attributes:
        scale, shift: parameters, ``()``.

    Shapes: x and y ``(N, J, D)``, log-variances ``(N, D)``; a named tuple of four scalars.

    Raises:
        ValueError: numbers out of range, shapes that do not match, log-variances that are missing.
        TypeError: features that are not floating-point.

    Source: Chun et al., "Probabilistic Embeddings for Cross-Modal Retrieval", CVPR 2021, equations
    1 to 5.
    """

    def __init__(
        self, scale: float = 15.0, shift: float = 15.0, *, uniformity: float = 0.0, kl: float = 0.0
    ):
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        if not uniformity >= 0 or not kl >= 0:
            raise ValueError(f"uniformity and kl must be >= 0, got {uniformity} and {kl}")
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.shift = nn.Parameter(torch.tensor(float(shift)))
        self.uniformity, self.kl = float(uniformity), float(kl)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_log_variance: Tensor | None = None,
        y_log_variance: Tensor | None = None,
    ) -> ProbabilisticTerms:
        x, y = self._checked(x, y)
        if x.shape != y.shape:
            raise ValueError(
                f"x and y must be of one shape (N, J, D), got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        zero = x.sum() * 0
        with full_precision(x):
            matching = zero
            for rows in blocks(x, y):
                matching = matching + checkpoint(self._matching, x, y, rows, use_reentrant=False)
            uniformity = self._uniformity(torch.cat([x, y]).flatten(0, 1)) if self.uniformity else 0
            kl = zero
            if self.kl:
                sides = ((x, "x", x_log_variance), (y, "y", y_log_variance))
                kl = sum(_divergence(*side) for side in sides)
        loss = matching + self.uniformity * uniformity + self.kl * kl
        return ProbabilisticTerms(loss, matching, zero + uniformity, kl)

    def match_probability(self, x: Tensor, y: Tensor) -> Tensor:
        """p of every item of x with every item of y, ``(N, J, D)``, ``(M, K, D)`` -> ``(N, M)``."""
        x, y = self._checked(x, y)
        with full_precision(x):
            parts = [self._logits(x[rows], y).sigmoid().mean((1, 3)) for rows in blocks(x, y)]
        return torch.cat(parts) if parts else x.new_zeros(0, len(y))

    def _checked(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        check_features("x", x)
        check_features("y", y, x.shape[-1])
        if x.dim() != 3 or y.dim() != 3 or not x.shape[1] or not y.shape[1]:
            raise ValueError(
                f"x and y must be (N, J, D) with J >= 1, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        return at_least_float32(x), at_least_float32(y)

    def _logits(self, x: Tensor, y: Tensor) -> Tensor:
        """2 (b - a d) of all samples: (n, J, D), (M, K, D) -> (n, J, M, K)."""
        square = squares(x.flatten(0, 1), y.flatten(0, 1))
        logits = 2 * (self.shift - self.scale * (square + 1e-6).sqrt())
        return logits.view(*x.shape[:2], *y.shape[:2])

    def _matching(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        logits = self._logits(x[rows], y)
        columns = torch.arange(len(y), device=y.device)
        sign = torch.where(rows[:, None] == columns, 1, -1).to(logits)
        log_shares = F.logsigmoid(sign[:, None, :, None] * logits)
        pairs = x.shape[1] * y.shape[1]
        return -2 * (log_shares.logsumexp((1, 3)) - math.log(pairs)).sum()

    def _uniformity(self, z: Tensor) -> Tensor:
        N, total = len(z), 0
        for rows in torch.arange(N, device=z.device).split(max(1, PAIRS_AT_A_TIME // N)):
            part = lambda z, rows: (-2 * squares(z[rows], z)).exp().sum()  # noqa: E731
            total = total + checkpoint(part, z, rows, use_reentrant=False)
        return ((total - N) / (N * (N - 1))).log()  # without the pairs of a sample with itself

    def extra_repr(self) -> str:
        return f"uniformity={self.uniformity}, kl={self.kl}"


def _divergence(samples: Tensor, name: str, log_variance: Tensor | None) -> Tensor:
    mean = samples.mean(1)
    if log_variance is None or log_variance.shape != mean.shape:
        got = None if log_variance is None else tuple(log_variance.shape)
        raise ValueError(f"{name}_log_variance must be {tuple(mean.shape)}, got {got}")
    v = at_least_float32(log_variance)
    return -0.5 * (1 + v - mean.square() - v.exp()).sum()


def blocks(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Indices of the items of x, some at a time."""
    if not len(x):
        return ()
    per_item = x.shape[1] * max(y.shape[0] * y.shape[1], 1)
    return torch.arange(len(x), device=x.device).split(max(1, PAIRS_AT_A_TIME // per_item))


def squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances around the mean of y: an offset that all share costs no digits."""
    center = y.detach().mean(0)
    x, y = x - center, y - center
    square = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT
    return square.clamp(min=0)
