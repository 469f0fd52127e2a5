"""Whitening: the linear maps that make the covariance of features the identity."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.ops.registration import FLOATS
from weft.ops.stats.moments import SegmentStats

KINDS = ("zca", "pca", "cholesky")


@dataclass(frozen=True)
class Whitening:
    r"""z = W (x − μ) with W Σ Wᵀ = I, made by ``weft.whitening``; callable.

    Attributes:
        mean: μ, ``(D,)``.
        matrix: W, ``(D, D)``.
        inverse_matrix: ``(D, D)``.
        eigenvalues: of the covariance before shrinkage and eps, ``(D,)``, descending.
    """

    mean: Tensor
    matrix: Tensor
    inverse_matrix: Tensor
    eigenvalues: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Whitened features, ``(..., D)`` in the dtype of x."""
        return self._moved(x, "x", lambda wide: (wide - self.mean) @ self.matrix.mT)

    def inverse(self, z: Tensor) -> Tensor:
        """The features that z was made of, ``(..., D)`` in the dtype of z."""
        return self._moved(z, "z", lambda wide: wide @ self.inverse_matrix.mT + self.mean)

    def _moved(self, x: Tensor, name: str, f) -> Tensor:
        D = self.mean.shape[0]
        if x.dim() < 1 or x.shape[-1] != D:
            raise ValueError(f"{name} must be (..., {D}), got {tuple(x.shape)}")
        return f(x.to(self.mean.dtype)).to(x.dtype)

    @property
    def effective_rank(self) -> Tensor:
        r"""exp(−Σ p_i log p_i), p = eigenvalues / their sum: 1 for a line, D for a sphere; 0 for a
        point. Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007."""
        total = self.eigenvalues.sum()
        p = self.eigenvalues / torch.where(total > 0, total, 1)
        entropy = -torch.xlogy(p, p).sum()
        return torch.where(total > 0, entropy.exp(), 0.0)


def whitening(
    data: Tensor | SegmentStats,
    kind: str = "zca",
    *,
    eps: float = 0.0,
    shrinkage: float = 0.0,
) -> Whitening:
    r"""The whitening map of features, or of their statistics. Computed in float64.

    .. math::
        \Sigma' = (1 - s) \Sigma + s \tfrac{\operatorname{tr} \Sigma}{D} I + \text{eps}\, I
            = U \Lambda U^\top = L L^\top

    ======== ==========================================================================
    zca      :math:`W = U \Lambda^{-1/2} U^\top`: symmetric, nearest to the features
    pca      :math:`W = \Lambda^{-1/2} U^\top`: uncorrelated directions, largest variance first
    cholesky :math:`W = L^{-1}`: lower triangular, feature i depends on the first i alone
    ======== ==========================================================================

    Args:
        data: features ``(N, D)``, N >= 2, whose covariance (over N - 1) is taken; or
            ``SegmentStats`` with a shared scatter, for the pooled within-class covariance and the
            mean of all rows.
        kind: "zca", "pca" or "cholesky".
        eps: added to every eigenvalue, >= 0.
        shrinkage: s in [0, 1], towards a multiple of the identity.

    Returns:
        A ``Whitening``: ``mean``, ``matrix``, ``inverse_matrix``, ``eigenvalues`` in float64,
        without gradients. Signs of "pca" rows are such that the largest entry is positive.

    Raises:
        ValueError: shapes, an unknown kind, eps or shrinkage out of range, data that are not
            finite, a covariance that is singular (ask for eps or shrinkage).
        TypeError: data of another type.

    Source: Kessy, Lewin and Strimmer, "Optimal Whitening and Decorrelation", The American
    Statistician 2018, table 1; as a step after contrastive pre-training: "On Scaling Contrastive
    Representations for Low-Resource Speech Recognition".
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
    with torch.no_grad():
        mean, covariance = _moments(data)
        if not (bool(mean.isfinite().all()) and bool(covariance.isfinite().all())):
            raise ValueError("data must be finite")
        eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
        D = mean.shape[0]
        identity = torch.eye(D, dtype=torch.float64, device=mean.device)
        level = shrinkage * eigenvalues.mean() + eps if D else 0.0
        regular = (1 - shrinkage) * covariance + level * identity
        matrix, inverse = _matrices(regular, kind)
    return Whitening(mean, matrix, inverse, eigenvalues)


def _moments(data: Tensor | SegmentStats) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) in float64."""
    if isinstance(data, SegmentStats):
        if data.scatter is None or data.scatter.dim() != 2:
            raise ValueError("data: statistics must be of segment_stats(covariance='shared')")
        count, mean = data.count.double(), data.mean.double()
        share = count / count.sum().clamp_min(1e-300)
        return share @ mean, data.covariance_matrix().double()
    if not isinstance(data, Tensor) or data.dtype not in FLOATS:
        kind = getattr(data, "dtype", type(data).__name__)
        raise TypeError(f"data must be a float tensor or SegmentStats, got {kind}")
    if data.dim() != 2 or data.shape[0] < 2:
        raise ValueError(f"data must be (N, D) with N >= 2, got {tuple(data.shape)}")
    mean = data.double().mean(0)
    centered = data.double() - mean
    return mean, centered.mT @ centered / (data.shape[0] - 1)


def _matrices(covariance: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """W and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    D = values.shape[0]
    if D and not values[0] > D * torch.finfo(torch.float64).eps * values[-1]:
        raise ValueError(
            "data: the covariance is singular (smallest and largest eigenvalue "
            f"{float(values[0]):.3g} and {float(values[-1]):.3g}); give eps or shrinkage"
        )
    if kind == "cholesky":
        L = torch.linalg.cholesky(covariance)
        identity = torch.eye(D, dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, identity, upper=False), L
    root = values.sqrt()
    if kind == "zca":
        return (vectors / root) @ vectors.mT, (vectors * root) @ vectors.mT
    vectors, root = vectors.flip(1), root.flip(0)
    if D:
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return (vectors / root).mT.contiguous(), vectors * root
