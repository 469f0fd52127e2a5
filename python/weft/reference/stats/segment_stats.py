"""Weight, mean and sum of squared deviations of the rows of each class.

n_c = Σ w_i,   μ_c = Σ w_i x_i / n_c,   M_c = Σ w_i (x_i − μ_c)²   over the rows i of class c

Two passes over the data, so that nothing cancels far from the origin.
"""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float32 of half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    shape = (num_classes, *values.shape[1:])
    return values.new_zeros(shape).index_add(0, labels, values)


def usable(total: Tensor) -> Tensor:
    """What to divide by: a class without weight has sums 0."""
    return torch.where(total > 0, total, 1)


def rows_used(x: Tensor, weights: Tensor | None) -> Tensor:
    """Zeros in the rows of weight 0, whatever they held; half precision in float32."""
    x = x.to(wide(x.dtype))
    return x if weights is None else torch.where((weights > 0)[:, None], x, 0)


def segment_stats(
    x: Tensor, labels: Tensor, weights: Tensor | None, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, M2 and low, (C, D); count (C,), int64 or with weights their sum).

    low is what rounding left of the mean: the deviations of M and of its gradient are from their
    sum, for far from the origin the digits of a mean are coarse beside them.
    """
    x = rows_used(x, weights)
    w = torch.ones_like(labels) if weights is None else weights
    count = sums(w, labels, num_classes)
    w = w.to(x.dtype)[:, None]
    total = usable(count.to(x.dtype))[:, None]
    mean = sums(w * x, labels, num_classes) / total
    # The mean of what the rounded mean leaves makes it exact to its last digits, and beyond.
    mean = mean + sums(w * (x - mean[labels]), labels, num_classes) / total
    low = (sums(w * (x - mean[labels]), labels, num_classes) / total).detach()
    m2 = sums(w * (x - mean[labels] - low[labels]).square(), labels, num_classes)
    return mean, m2, low, count


def segment_stats_backward(
    x: Tensor,
    grad_count: Tensor | None,
    grad_mean: Tensor,
    grad_m2: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    total: Tensor,
    mean: Tensor,
    low: Tensor,
) -> tuple[Tensor, Tensor]:
    """∂x_i = w_i (∂μ_c / n_c + 2 ∂M_c r_i),   ∂w_i = ∂n_c + Σ_d r_i (∂μ_c / n_c + ∂M_c r_i)

    with r_i = x_i − μ_c − low_c. That M depends on the mean changes nothing: Σ w_i r_i = 0.
    """
    r = rows_used(x, weights) - mean[labels] - low[labels]
    of_mean = (grad_mean / usable(total)[:, None])[labels]
    of_m2 = grad_m2[labels]
    slope = of_mean + 2 * of_m2 * r
    if weights is None:
        return slope.to(x.dtype), mean.new_empty(0)
    used = weights > 0
    grad_weights = grad_count[labels] + (r * (of_mean + of_m2 * r)).sum(-1)
    grad_x = torch.where(used[:, None], weights[:, None] * slope, 0)
    return grad_x.to(x.dtype), torch.where(used, grad_weights, 0)


def scatter(
    x: Tensor, labels: Tensor, weights: Tensor | None, mean: Tensor, shared: bool
) -> Tensor:
    """Σ w_i r_i r_iᵀ: of all classes together, (D, D), or of each, (C, D, D)."""
    r = rows_used(x, weights) - mean[labels]
    if weights is not None:
        r = torch.where((weights > 0)[:, None], r, 0)
    weighted = r if weights is None else weights[:, None] * r
    if shared:
        return weighted.mT @ r
    order = labels.argsort(stable=True)
    lengths = torch.bincount(labels, minlength=mean.shape[0]).tolist()
    parts = zip(weighted[order].split(lengths), r[order].split(lengths), strict=True)
    products = [one.mT @ two for one, two in parts]
    return torch.stack(products) if products else r.new_zeros(0, r.shape[1], r.shape[1])
