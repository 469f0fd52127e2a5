"""Statistics of classes as one value: what can be read of it, and how two are joined."""

from typing import NamedTuple

import torch
from torch import Tensor


def _left(count: Tensor, ddof: float, dtype: torch.dtype) -> Tensor:
    """Degrees of freedom after a mean took ``ddof`` from each class that has samples."""
    return torch.where(count > 0, count - ddof, 0).to(dtype)


def _divided(sums: Tensor, by: Tensor) -> Tensor:
    return torch.where(by > 0, sums / torch.where(by > 0, by, 1), 0)


class SegmentStats(NamedTuple):
    r"""Statistics of C classes of rows with D features. A tuple, and so a pytree, of plain tensors.

    Attributes:
        count: ``(C,)`` rows, int64; of weighted rows the sum of their weights, floating.
        mean: ``(C, D)``; 0 for a class without rows.
        m2: ``(C, D)``, sums of squared deviations from the mean.
        scatter: sums of products of deviations: ``(C, D, D)`` of each class, ``(D, D)`` of all
            classes around their own means, or None.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    scatter: Tensor | None = None

    @classmethod
    def empty(
        cls,
        num_classes: int,
        features: int,
        *,
        covariance: str | bool = False,
        weighted: bool = False,
        dtype: torch.dtype = torch.float32,
        device=None,
    ) -> "SegmentStats":
        """Statistics of no rows, to merge others into."""
        zeros = lambda *shape: torch.zeros(*shape, dtype=dtype, device=device)  # noqa: E731
        C, D = num_classes, features
        shapes = {False: None, True: (C, D, D), "class": (C, D, D), "shared": (D, D)}
        shape = shapes[covariance]
        count = torch.zeros(C, dtype=dtype if weighted else torch.int64, device=device)
        return cls(count, zeros(C, D), zeros(C, D), None if shape is None else zeros(*shape))

    def variance(self, ddof: float = 1) -> Tensor:
        """``m2 / (count - ddof)``, ``(C, D)``; 0 where no degree of freedom is left."""
        return _divided(self.m2, _left(self.count, ddof, self.m2.dtype)[:, None])

    def covariance_matrix(self, ddof: float = 1) -> Tensor:
        """``scatter / (count - ddof)``; the shared one is over the sum of these, the pooled
        within-class covariance of discriminant analysis. 0 where no degree of freedom is left."""
        if self.scatter is None:
            raise ValueError(
                "scatter is None: ask segment_stats for covariance='class' or 'shared'"
            )
        left = _left(self.count, ddof, self.scatter.dtype)
        left = left.sum() if self.scatter.dim() == 2 else left[:, None, None]
        return _divided(self.scatter, left)

    def merge(self, other: "SegmentStats") -> "SegmentStats":
        r"""The statistics of the rows of both, differentiable in both.

        .. math::
            \mu = \mu_a + \tfrac{n_b}{n} \delta, \quad
            M = M_a + M_b + \tfrac{n_a n_b}{n} \delta^2, \quad \delta = \mu_b - \mu_a

        Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances", 1979.
        """
        shape_of = lambda t: None if t is None else tuple(t.shape)  # noqa: E731
        for name, one, two in zip(self._fields, self, other, strict=True):
            if shape_of(one) != shape_of(two):
                raise ValueError(
                    f"other.{name} must be {shape_of(one)} as of these, got {shape_of(two)}"
                )
        dtype = torch.promote_types(self.mean.dtype, other.mean.dtype)
        count = self.count + other.count
        n = torch.where(count > 0, count, 1).to(dtype)
        share = (other.count.to(dtype) / n)[:, None]
        between = self.count.to(dtype)[:, None] * share
        delta = other.mean - self.mean
        mean = self.mean + share * delta
        m2 = self.m2 + other.m2 + between * delta.square()
        scatter = self.scatter
        if scatter is not None:
            shared = scatter.dim() == 2
            part = between * delta
            extra = part.mT @ delta if shared else part[:, :, None] * delta[:, None]
            scatter = scatter + other.scatter + extra
        return SegmentStats(count, mean, m2, scatter)
