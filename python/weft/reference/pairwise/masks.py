"""Which pairs of rows count, as one (N, M) matrix:

allowed_ij  and  (x_label_i = y_label_j) is `same`  and  i ≠ j if the diagonal is left out
"""

import torch
from torch import Tensor


def allowed_pairs(
    N: int,
    M: int,
    device: torch.device,
    allowed: Tensor | None,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    same: bool,
    off_diagonal: bool,
    first_row: int = 0,
) -> Tensor | None:
    """(N, M) bool, True where a pair counts; None where all do. Of a matrix with more rows, those
    from ``first_row`` on."""
    conditions = [] if allowed is None else [allowed]
    if x_labels is not None:
        equal = x_labels[:, None] == y_labels
        conditions.append(equal if same else ~equal)
    if off_diagonal:
        rows = torch.arange(first_row, first_row + N, device=device)
        conditions.append(rows[:, None] != torch.arange(M, device=device))
    mask = None
    for condition in conditions:
        mask = condition if mask is None else mask & condition
    return mask


def mask_values(s: Tensor, mask: Tensor | None, fill: float) -> Tensor:
    """``fill`` where the mask is False, whatever stood there."""
    return s if mask is None else torch.where(mask, s, s.new_tensor(fill))
