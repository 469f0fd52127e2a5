"""Which units of two networks have learned the same: correlations over data, and their matching."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from weft.nn.checks import check_features, check_sizes
from weft.nn.class_statistics import ClassStatistics

METHODS = ("bipartite", "greedy", "many")


class UnitMatches(NamedTuple):
    """The unit of the second network that each unit of the first is matched with.

    Attributes:
        indices: ``(D1,)`` int64; -1 for a unit that is left over.
        correlation: ``(D1,)``; 0 for a unit that is left over.
    """

    indices: Tensor
    correlation: Tensor


class UnitCorrelation(nn.Module):
    r"""Correlations between the units of two networks, over any number of batches.

    .. math::
        C_{ij} = \frac{E[(x_i - \mu_i)(y_j - \nu_j)]}{\sigma_i \, \tau_j}

    The moments of all units together are kept in one :class:`ClassStatistics`, ``statistics``, a
    submodule, whose batches are merged around their means: nothing cancels where activations are
    far from 0. Of convolutional units each place counts as a sample. A unit that never changes has
    correlation 0 with all, itself too.

    Args:
        first_units: D1.
        second_units: D2.
        device, dtype: of the moments, float64 or float32.

    Shapes: ``update`` takes x ``(N, D1)`` and y ``(N, D2)``, or maps ``(N, D1, H, W)`` and ``(N,
    D2, H, W)``, activations for the same samples; ``forward`` gives ``(D1, D2)``; ``within(0)`` and
    ``within(1)`` give ``(D1, D1)`` and ``(D2, D2)``, the correlations inside one network.

    Raises:
        ValueError: sizes, shapes that do not match.
        TypeError: activations that are not floating-point, a dtype of moments that is neither
            float64 nor float32.

    Source: Li et al., "Convergent Learning: Do different neural networks learn the same
    representations?", ICLR 2016, section 3.
    """

    def __init__(self, first_units: int, second_units: int, *, device=None, dtype=None):
        super().__init__()
        check_sizes(first_units=first_units, second_units=second_units)
        self.first_units, self.second_units = first_units, second_units
        units = first_units + second_units
        self.statistics = ClassStatistics(units, 1, "shared", device=device, dtype=dtype)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds samples."""
        rows = []
        for name, t, units in (("x", x, self.first_units), ("y", y, self.second_units)):
            check_features(name, t)
            if t.dim() not in (2, 4) or t.shape[1] != units:
                raise ValueError(
                    f"{name} must be (N, {units}) or (N, {units}, H, W), got {tuple(t.shape)}"
                )
            rows.append(t.movedim(1, -1).flatten(0, -2).to(self.statistics.mean.dtype))
        if x.shape[0] != y.shape[0] or x.shape[2:] != y.shape[2:]:
            raise ValueError(
                "y must have the samples and places of x, got "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        both = torch.cat(rows, 1)
        labels = torch.zeros(len(both), dtype=torch.int64, device=both.device)
        self.statistics.update(both, labels)

    def forward(self) -> Tensor:
        """Between the networks, ``(D1, D2)``."""
        return self._correlation()[: self.first_units, self.first_units :]

    def within(self, network: int) -> Tensor:
        """Inside the first (0) or the second network (1)."""
        if network not in (0, 1):
            raise ValueError(f"network must be 0 or 1, got {network!r}")
        D1, every = self.first_units, self._correlation()
        return every[D1:, D1:] if network else every[:D1, :D1]

    def _correlation(self) -> Tensor:
        scatter = self.statistics.scatter
        inverse = scatter.diagonal().sqrt().reciprocal()
        inverse = torch.where(inverse.isfinite(), inverse, 0)
        return (scatter * inverse[:, None] * inverse).clamp(-1, 1)

    def extra_repr(self) -> str:
        return f"first_units={self.first_units}, second_units={self.second_units}"


def match_units(correlation: Tensor, method: str = "bipartite") -> UnitMatches:
    r"""Matches the units of two networks by their correlations.

    Args:
        correlation: ``(D1, D2)``, D2 >= 1.
        method: bipartite: one to one, with the largest sum of correlations, by
            ``scipy.optimize.linear_sum_assignment``. greedy: one to one, the largest correlation
            first, then the largest of the units that are left. many: each unit with the one that it
            correlates with most; several may share it. Of equal correlations the first counts.

    Returns:
        :class:`UnitMatches`. How much less bipartite has than many tells how many units have no
        partner of their own.

    Raises:
        ValueError: a shape, an unknown method, correlations that are not finite.
        TypeError: correlations that are not floating-point.
        ImportError: bipartite without scipy.

    Source: Li et al., "Convergent Learning: Do different neural networks learn the same
    representations?", ICLR 2016, sections 3.1 and 3.2.
    """
    check_features("correlation", correlation)
    if correlation.dim() != 2 or not correlation.shape[1]:
        raise ValueError(f"correlation must be (D1, D2), D2 >= 1, got {tuple(correlation.shape)}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not correlation.isfinite().all():
        raise ValueError("correlation must be finite")
    D1, D2 = correlation.shape
    indices = torch.full((D1,), -1, dtype=torch.int64)
    if method == "many":
        indices = correlation.max(1).indices
    elif method == "bipartite":
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(
            correlation.detach().cpu().double().numpy(), maximize=True
        )
        indices[torch.as_tensor(rows)] = torch.as_tensor(columns)
    else:
        taken = torch.zeros(D2, dtype=torch.bool)
        pairs = correlation.detach().cpu().flatten().sort(descending=True, stable=True).indices
        left = min(D1, D2)
        for pair in pairs.tolist():
            i, j = divmod(pair, D2)
            if indices[i] < 0 and not taken[j]:
                indices[i], taken[j], left = j, True, left - 1
                if not left:
                    break
    indices = indices.to(correlation.device)
    chosen = correlation.gather(1, indices.clamp(min=0)[:, None])[:, 0]
    return UnitMatches(indices, torch.where(indices >= 0, chosen, 0))
