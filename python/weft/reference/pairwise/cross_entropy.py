"""Cross entropies over all pairs of rows: logits s_ij of x_i and y_j against targets T_ij.

v_ij = scale · factor · ⟨x_i, y_j⟩ + bias_j,     s_ij = c tanh(v_ij / c)  or  v_ij
s_ij −= margin  where j is the target of i
T_ij = share_i P_ij + uniform        P: positives, by index, by equal labels, or as a matrix
lse_i = log Σ_j e^{s_ij}  or, sigmoid,  Σ_j log(1 + e^{s_ij})          over the pairs that count
t_i   = Σ_j T_ij s_ij

loss_i = lse_i − t_i, and likewise over the columns. A pair counts if it is a positive or the mask
allows it, and is not a row with itself where those are excluded.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.reference.pairwise.subspace_logits import upcast


def positive_pairs(
    N: int, M: int, target: Tensor, column_labels: Tensor | None, positives: Tensor | None
) -> Tensor:
    """P: (N, M) bool."""
    if positives is not None:
        return positives
    labels = column_labels
    if labels is None:
        labels = torch.arange(M, device=target.device)
    return target[:, None] == labels[None, :]


def _logits(x, y, factor, bias, scale, softcap):
    u = x @ y.mT
    v = scale * u if factor is None else scale * factor * u
    if bias is not None:
        v = v + bias
    return u, softcap * (v / softcap).tanh() if softcap else v


def _log_sum_exp(s: Tensor, counts: Tensor, dim: int, sigmoid: bool) -> Tensor:
    if sigmoid:
        return torch.where(counts, F.softplus(s, threshold=50.0), 0).sum(dim)
    none = ~counts.any(dim, keepdim=True)  # −∞, without the NaN of its derivative
    s = torch.where(counts, s, torch.where(none, 0.0, -torch.inf).to(s.dtype))
    if not s.shape[dim]:
        return s.sum(dim) - torch.inf
    return s.logsumexp(dim).masked_fill(none.squeeze(dim), -torch.inf)


def _pieces(x, y, factor, bias, target, column_labels, mask, positives, options):
    """u, s before the margin, s, P and which pairs count, in the accumulation dtype."""
    scale, softcap, margin, _, _, exclude_diagonal = options
    N, M = x.shape[0], y.shape[0]
    positive = positive_pairs(N, M, target, column_labels, positives)
    counts = torch.ones_like(positive) if mask is None else mask | positive
    if exclude_diagonal:
        other = ~torch.eye(N, M, dtype=torch.bool, device=x.device)
        positive, counts = positive & other, counts & other
    u, capped = _logits(x, y, factor, bias, scale, softcap)
    s = capped - margin * positive.to(capped.dtype) if margin else capped
    return u, capped, s, positive, counts


def _targets(s, positive, counts, share, uniform, dim):
    """Σ T s over a dimension; what has T = 0 is not looked at."""
    total = torch.where(positive, s, 0).sum(dim) * share
    return total + uniform * torch.where(counts, s, 0).sum(dim) if uniform else total


def pairwise_cross_entropy(
    x: Tensor,
    y: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    column_labels: Tensor | None,
    mask: Tensor | None,
    positives: Tensor | None,
    row_share: Tensor,
    column_share: Tensor | None,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, row lse, row t, column lse, column t), in float32 for half precision.

    The loss is Σ_i weight_i loss_i over rows and columns, 0 without weights; a weight of 0 leaves
    its row out. Columns are empty without ``column_share``.
    """
    _, _, _, uniform, sigmoid, _ = options
    x, y = upcast(x, y)
    inputs = (x, y, factor, bias, target, column_labels, mask, positives)
    _, _, s, positive, counts = _pieces(*inputs, options)
    row_lse = _log_sum_exp(s, counts, 1, sigmoid)
    row_target = _targets(s, positive, counts, row_share, uniform, 1)
    loss = _weighted(row_weight, row_lse, row_target)
    if column_share is None:
        return loss, row_lse, row_target, x.new_empty(0), x.new_empty(0)
    column_lse = _log_sum_exp(s, counts, 0, sigmoid)
    column_target = _targets(s, positive, counts, column_share, uniform, 0)
    loss = loss + _weighted(column_weight, column_lse, column_target)
    return loss, row_lse, row_target, column_lse, column_target


def _weighted(weight, lse, target):
    if weight is None:
        return lse.new_zeros(())
    return torch.where(weight == 0, 0, weight * (lse - target)).sum()


def pairwise_cross_entropy_backward(
    x: Tensor,
    y: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    column_labels: Tensor | None,
    mask: Tensor | None,
    positives: Tensor | None,
    row_share: Tensor,
    column_share: Tensor | None,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
    scale: float,
    softcap: float,
    margin: float,
    uniform: float,
    sigmoid: bool,
    exclude_diagonal: bool,
    grad_loss: Tensor | None,
    grad_row_lse: Tensor | None,
    grad_row_target: Tensor | None,
    grad_column_lse: Tensor | None,
    grad_column_target: Tensor | None,
    row_lse: Tensor | None = None,
    column_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_ij = ∂L/∂s_ij = a_i p_ij + b_i T_ij, with a, b the gradients of lse and t, plus the same of
    columns; g = w (1 − (s/c)²);  ∂x = scale factor g y,  ∂y = scale factor gᵀ x,  ∂bias_j = Σ_i
    g_ij,  ∂factor = scale Σ_ij g_ij ⟨x_i, y_j⟩.  p = e^{s − lse}, or the sigmoid of s.

    The lse of more columns than are here may be given; it is then a constant."""
    dtype = x.dtype
    x, y = upcast(x, y)
    options = (scale, softcap, margin, uniform, sigmoid, exclude_diagonal)
    inputs = (x, y, factor, bias, target, column_labels, mask, positives)
    u, capped, s, positive, counts = _pieces(*inputs, options)
    if grad_loss is not None:
        grad_row_lse = grad_loss * row_weight
        grad_row_target = -grad_row_lse
        if column_share is not None:
            grad_column_lse = grad_loss * column_weight
            grad_column_target = -grad_column_lse

    def weights(dim, share, lse, of_lse, of_target):
        of_lse, of_target, share = (t.unsqueeze(dim) for t in (of_lse, of_target, share))
        lse = (_log_sum_exp(s, counts, dim, False) if lse is None else lse).unsqueeze(dim)
        some = counts & (lse != -torch.inf)
        p = s.sigmoid() if sigmoid else torch.where(some, s - lse, -torch.inf).exp()
        p = torch.where(counts & ((of_lse != 0) | p.isfinite()), p, 0)
        T = share * positive + uniform * counts.to(s.dtype)
        return of_lse * p + of_target * T

    w = weights(1, row_share, row_lse, grad_row_lse, grad_row_target)
    if column_share is not None:
        w = w + weights(0, column_share, column_lse, grad_column_lse, grad_column_target)
    if softcap:
        w = torch.where(w == 0, 0, w * (1 - (capped / softcap).square()))
    h = scale * w if factor is None else scale * factor * w
    of_factor = x.new_empty(0)
    if factor is not None:
        of_factor = scale * torch.where(w == 0, 0, w * u).sum()
    of_bias = x.new_empty(0) if bias is None else w.sum(0)
    return _sums(h, y).to(dtype), _sums(h.mT, x).to(dtype), of_factor, of_bias


def _sums(h: Tensor, points: Tensor) -> Tensor:
    """h @ points where a weight of 0 leaves out what is not finite."""
    finite = points.isfinite()
    spoiled = (h != 0).to(h.dtype) @ (~finite).to(h.dtype)
    return (h @ points.masked_fill(~finite, 0)).masked_fill(spoiled > 0, torch.nan)
