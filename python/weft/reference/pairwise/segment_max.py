"""The best row of a segment, for each row of another matrix.

v_slm = ⟨x_sl, y_m⟩  or  −‖x_sl − y_m‖²
indices_sm = the first l < length_s with the largest v_slm (a NaN is larger), −1 if length_s = 0
values_sm = v_{s, indices_sm, m}, −∞ if length_s = 0

Segments are x_s = x[s, :length_s] of a padded (S, L, D), or x[offset_s : offset_{s+1}] of (T, D).
"""

import torch
from torch import Tensor

from weft.reference.pairwise.pairs import base_values
from weft.reference.pairwise.subspace_logits import upcast


def padded(x: Tensor, offsets: Tensor | None) -> Tensor:
    """(T, D) with offsets as (S, L, D), behind each segment rows of others."""
    if offsets is None:
        return x
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    rows = offsets[:-1, None] + torch.arange(longest, device=x.device)
    return x[rows.clamp(max=max(x.shape[0] - 1, 0))]


def lengths_of(x: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Tensor:
    if offsets is not None:
        return offsets.diff()
    full = torch.full((x.shape[0],), x.shape[1], device=x.device)
    return full if lengths is None else lengths


def segment_max_indices(
    x: Tensor, y: Tensor, lengths: Tensor | None, offsets: Tensor | None, base: str
) -> Tensor:
    """(S, M) int64, compared in float64 and a segment at a time."""
    lengths, x, y = lengths_of(x, lengths, offsets), padded(x, offsets), y.detach().double()
    found = []
    for rows, length in zip(x.detach().double(), lengths, strict=True):
        if base == "dot":
            v = rows @ y.mT
        else:
            v = -torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist")
        used = torch.arange(rows.shape[0], device=x.device) < length
        v = torch.where(used[:, None], v, -torch.inf)
        best = torch.cat([v, v.new_full((1, y.shape[0]), -torch.inf)]).argmax(0)
        found.append(torch.where(best < length, best, -1))
    return torch.stack(found) if found else lengths.new_empty(0, y.shape[0])


def rows_of(x: Tensor, indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All rows (T, D) with one of zeros behind them; which of them each value takes, T at −1; and
    the rows taken, in the dtype of sums."""
    if offsets is None:
        first = torch.arange(x.shape[0], device=x.device) * x.shape[1]
        x = x.flatten(0, 1)
    else:
        first = offsets[:-1]
    (x,) = upcast(torch.cat([x, x.new_zeros(1, x.shape[1])]))
    number = torch.where(indices >= 0, first[:, None] + indices, x.shape[0] - 1)
    return x, number, x[number]


def segment_max(
    x: Tensor, y: Tensor, lengths: Tensor | None, offsets: Tensor | None, base: str
) -> tuple[Tensor, Tensor]:
    indices = segment_max_indices(x, y, lengths, offsets, base)
    _, _, rows = rows_of(x, indices, offsets)
    v = base_values(rows, *upcast(y), base)
    return torch.where(indices < 0, -torch.inf, v if base == "dot" else -v), indices


def segment_max_backward(
    grad: Tensor, x: Tensor, y: Tensor, indices: Tensor, offsets: Tensor | None, base: str
) -> tuple[Tensor, Tensor]:
    """Each value has one row of x and one of y to give its gradient to:

    ∂x = g y  or  −2 g (x − y),   ∂y = g x  or  2 g (x − y)
    """
    all_rows, number, rows = rows_of(x, indices, offsets)
    wide = upcast(y)[0]
    g = torch.where(indices >= 0, grad, 0)[..., None]
    if base == "dot":
        of_x, of_y = g * wide, g * rows
    else:
        of_x = -2 * g * (rows - wide)
        of_y = -of_x
    grad_x = torch.zeros_like(all_rows).index_add(0, number.flatten(), of_x.flatten(0, 1))
    return grad_x[:-1].reshape(x.shape).to(x.dtype), of_y.sum(0).to(y.dtype)


def maxsim(values: Tensor, queries: int, query_lengths: Tensor | None) -> Tensor:
    """Σ_i of the maxima: (documents, queries · tokens) -> (queries, documents)."""
    values = values.unflatten(1, (queries, values.shape[1] // max(queries, 1)))
    if query_lengths is not None:
        used = torch.arange(values.shape[2], device=values.device) < query_lengths[:, None]
        values = torch.where(used, values, 0)
    return values.sum(-1).mT.clone(memory_format=torch.contiguous_format)
