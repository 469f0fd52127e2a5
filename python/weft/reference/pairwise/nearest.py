"""The k best pairs of each row: indices by the exact order of v, values of those pairs.

order of columns in row i:  NaN first, then v_ij ascending (descending for the largest), then j
indices_i = the first k columns that the mask allows, then −1
values_ir = f(v_{i, indices_ir}), or the fill where the index is −1

f is monotone, so v decides (weft.reference.pairwise.pairs). It is compared in float64, from
differences and not from an expanded square: nothing cancels, and repeated points tie.
"""

import torch
from torch import Tensor

from weft.reference.pairwise.masks import allowed_pairs
from weft.reference.pairwise.pairs import Pair, apply_function, base_values
from weft.reference.pairwise.subspace_logits import upcast

BLOCK = 1 << 22  # values of v held at a time
NO_MASK = (None, None, None, True, False)  # what allowed_pairs makes a mask of


def is_decreasing(pair: Pair) -> bool:
    """Whether f falls where v grows."""
    return pair.function == "exp" or (pair.function == "log_ratio" and pair.parameter < 1)


def fill_of(largest: bool) -> float:
    """What a row with too few columns is filled with: worse than every value."""
    return -torch.inf if largest else torch.inf


def arguments_of_function(
    x: Tensor,
    y: Tensor,
    pair: Pair,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """v of all pairs, float64 without gradients."""
    wide = lambda t: t.detach().double()  # noqa: E731
    if pair.base == "dot":
        u = wide(x) @ wide(y).mT
    elif pair.base == "l1":
        u = torch.cdist(wide(x), wide(y), p=1.0)
    else:
        direct = "donot_use_mm_for_euclid_dist"
        u = torch.cdist(wide(x), wide(y), compute_mode=direct).square()
    v = pair.scale * u
    if row_factor is not None:
        v = v * wide(row_factor)[:, None]
    if column_factor is not None:
        v = v * wide(column_factor)
    return v if bias is None else v + wide(bias)


def best_columns(v: Tensor, mask: Tensor | None, k: int, largest: bool) -> Tensor:
    """(N, M) -> (N, k): the first k allowed columns in the order above, then −1."""
    N, M = v.shape
    v = -v if largest else v
    rank = torch.where(v.isnan(), 0, 1)  # NaN, numbers, what is masked
    if mask is not None:
        rank = torch.where(mask, rank, 2)
    order = torch.where(rank == 1, v, 0).sort(dim=1, stable=True).indices
    order = order.gather(1, rank.gather(1, order).sort(dim=1, stable=True).indices)[:, :k]
    found = torch.where(rank.gather(1, order) < 2, order, -1)
    return torch.cat([found, found.new_full((N, k - found.shape[1]), -1)], 1)


def nearest_indices(
    x: Tensor,
    y: Tensor,
    pair: Pair,
    row_factor: Tensor | None = None,
    column_factor: Tensor | None = None,
    bias: Tensor | None = None,
    mask: tuple = NO_MASK,
    k: int = 1,
    largest: bool = False,
) -> Tensor:
    """(N, k) int64, a block of rows at a time."""
    allowed, x_labels, *others = mask
    rows = max(1, BLOCK // max(1, y.shape[0]))
    largest = largest != is_decreasing(pair)
    part = lambda t, i: None if t is None else t[i : i + rows]  # noqa: E731
    blocks = []
    for i in range(0, max(x.shape[0], 1), rows):
        block = x[i : i + rows]
        v = arguments_of_function(block, y, pair, part(row_factor, i), column_factor, bias)
        shape = (*v.shape, x.device)
        keep = allowed_pairs(*shape, part(allowed, i), part(x_labels, i), *others, first_row=i)
        blocks.append(best_columns(v, keep, k, largest))
    return torch.cat(blocks)


def pairs_at(
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    indices: Tensor,
    pair: Pair,
) -> tuple[Tensor, ...]:
    """Rows of x and y, α, β and u of the chosen pairs; at −1 all are 0, whatever stands there."""
    x, y = upcast(x, y)
    found = indices >= 0
    rows = torch.where(found[..., None], x[:, None], 0)
    columns = _with_zero(y)[indices]  # −1 reads the zeros
    one = x.new_ones(())
    alpha = one if row_factor is None else torch.where(found, row_factor[:, None], 0)
    beta = one if column_factor is None else _with_zero(column_factor)[indices]
    return rows, columns, alpha, beta, base_values(rows, columns, pair.base)


def _with_zero(t: Tensor) -> Tensor:
    return torch.cat([t, t.new_zeros(1, *t.shape[1:])])


def nearest(
    x: Tensor,
    y: Tensor,
    pair: Pair,
    row_factor: Tensor | None = None,
    column_factor: Tensor | None = None,
    bias: Tensor | None = None,
    mask: tuple = NO_MASK,
    k: int = 1,
    largest: bool = False,
) -> tuple[Tensor, Tensor]:
    indices = nearest_indices(x, y, pair, row_factor, column_factor, bias, mask, k, largest)
    _, _, alpha, beta, u = pairs_at(x, y, row_factor, column_factor, indices, pair)
    v = pair.scale * alpha * beta * u
    v = v if bias is None else v + _with_zero(bias)[indices]
    found = indices >= 0
    s = apply_function(torch.where(found, v + pair.shift, 0), pair.function, pair.parameter)
    return torch.where(found, s, fill_of(largest)).to(x.dtype), indices


def derivative(v: Tensor, function: str, parameter: float) -> Tensor:
    """f'(v), 0 at v = 0 where f has none."""
    if function == "identity":
        return torch.ones_like(v)
    if function == "exp":
        return -(-v).exp()
    if function == "log_ratio":
        return 1 / (v + 1) - 1 / (v + parameter)
    zero = v <= 0
    safe = v.masked_fill(zero, 1)
    slope = 0.5 / safe.sqrt() if function == "root" else parameter / (safe * (safe + 2)).sqrt()
    return slope.masked_fill(zero, 0)


def nearest_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    pair: Pair,
    indices: Tensor,
) -> tuple[Tensor | None, ...]:
    """Each value has one row of x and one of y to give its gradient to:

    ∂v = g f'(v),   ∂u = ∂v scale α β,   ∂x = ∂u y  or  2 ∂u (x − y)  or  ∂u sign(x − y)
    """
    rows, columns, alpha, beta, u = pairs_at(x, y, row_factor, column_factor, indices, pair)
    v = pair.scale * alpha * beta * u
    v = v if bias is None else v + _with_zero(bias)[indices]
    found = indices >= 0
    v = torch.where(found, v + pair.shift, 0)
    slope = derivative(v, pair.function, pair.parameter)
    dv = torch.where(found, grad.to(u.dtype) * slope, 0)
    du = (dv * pair.scale * alpha * beta)[..., None]
    if pair.base == "dot":
        of_rows, of_columns = du * columns, du * rows
    else:
        difference = rows - columns
        of_rows = du * (2 * difference if pair.base == "sqeuclidean" else difference.sign())
        of_columns = -of_rows

    def by_column(t: Tensor, like: Tensor) -> Tensor:
        target = torch.where(found, indices, y.shape[0]).flatten()
        return t.new_zeros(_with_zero(like).shape).index_add(0, target, t.flatten(0, 1))[:-1]

    return (
        of_rows.sum(1).to(x.dtype),
        by_column(of_columns, y).to(y.dtype),
        None if row_factor is None else (dv * pair.scale * beta * u).sum(1),
        None if column_factor is None else by_column(dv * pair.scale * alpha * u, column_factor),
        None if bias is None else by_column(dv, bias),
    )
