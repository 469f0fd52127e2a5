"""The backward of every dense reduction of s_ij, from the weights w_ij = ∂L/∂s_ij.

g_ij = w_ij f'(v_ij) = ∂L/∂v_ij,       h_ij = scale α_i β_j g_ij = ∂L/∂u_ij
dot:          ∂x_i = Σ_j h_ij y_j                    ∂y_j = Σ_i h_ij x_i
sqeuclidean:  ∂x_i = Σ_j 2 h_ij (x_i − y_j)          ∂y_j = −Σ_i 2 h_ij (x_i − y_j)
l1:           ∂x_i = Σ_j h_ij sign(x_i − y_j)        ∂y_j = −Σ_i h_ij sign(x_i − y_j)
∂bias_j = Σ_i g_ij,   ∂α_i = Σ_j g_ij scale β_j u_ij,   ∂β_j = Σ_i g_ij scale α_i u_ij
"""

import torch
from torch import Tensor

from weft.reference.pairwise.masks import mask_values
from weft.reference.pairwise.nearest import derivative
from weft.reference.pairwise.pairs import Pair, base_values
from weft.reference.pairwise.subspace_logits import upcast


def pair_gradients(
    weights: Tensor,
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    pair: Pair,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Of x and y in their dtype, of the factors and the bias; None where there is none."""
    dtype = x.dtype
    x, y = upcast(x, y)
    u = x @ y.mT if pair.base == "dot" else base_values(x[:, None], y[None], pair.base)
    one = u.new_ones(())
    alpha = one if row_factor is None else row_factor[:, None]
    beta = one if column_factor is None else column_factor
    v = pair.scale * alpha * beta * u + (0 if bias is None else bias) + pair.shift
    g = mask_values(weights * derivative(v, pair.function, pair.parameter), mask, 0)
    h = pair.scale * alpha * beta * g
    if pair.base == "dot":
        of_x, of_y = weighted_sums(h, y, mask), weighted_sums(h.mT, x, _mT(mask))
    else:
        difference = x[:, None] - y[None]
        slope = 2 * difference if pair.base == "sqeuclidean" else difference.sign()
        terms = mask_values(h[..., None] * slope, None if mask is None else mask[..., None], 0)
        of_x, of_y = terms.sum(1), -terms.sum(0)
    gu = mask_values(pair.scale * g * u, mask, 0)
    return (
        of_x.to(dtype),
        of_y.to(dtype),
        None if row_factor is None else (gu * beta).sum(1),
        None if column_factor is None else (gu * alpha).sum(0),
        None if bias is None else g.sum(0),
    )


def weighted_sums(weights: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Σ_j w_ij values_j, (N, M) × (M, E) -> (N, E); what is masked is not read."""
    if mask is None:
        return weights @ values
    return torch.where(mask[..., None], weights[..., None] * values, 0).sum(1)


def _mT(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.mT
