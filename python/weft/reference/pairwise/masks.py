"""Which pairs of rows count, as one (N, M) matrix:

allowed_ij = dense_ij  and  (row_label_i = column_label_j) is `same`  and  i ≠ j if the diagonal is
excluded
"""

import torch
from torch import Tensor


def allowed_pairs(
    N: int,
    M: int,
    device: torch.device,
    dense: Tensor | None,
    row_labels: Tensor | None,
    column_labels: Tensor | None,
    same: bool,
    exclude_diagonal: bool,
    first_row: int = 0,
) -> Tensor | None:
    """(N, M) bool, True where a pair counts; None where all do. Of a matrix with more rows, those
    from ``first_row`` on."""
    conditions = [] if dense is None else [dense]
    if row_labels is not None:
        equal = row_labels[:, None] == column_labels
        conditions.append(equal if same else ~equal)
    if exclude_diagonal:
        rows = torch.arange(first_row, first_row + N, device=device)
        conditions.append(rows[:, None] != torch.arange(M, device=device))
    mask = None
    for condition in conditions:
        mask = condition if mask is None else mask & condition
    return mask
