"""Rows of length 1:  û = x / max(‖x‖, eps);  without eps 0 at 0, where every derivative is 0."""

import torch
from torch import Tensor

from weft.reference.pairwise.subspace_logits import norm, unit, upcast


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """(B, D) -> (B, D) in the dtype of x, computed in float32 for half precision."""
    return unit(*upcast(x), eps).to(x.dtype)


def unit_rows_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """∂x = (∂û − û⟨û, ∂û⟩)/‖x‖, or ∂û/eps where ‖x‖ <= eps."""
    dtype = x.dtype
    grad, x = upcast(grad, x)
    length = norm(x)[:, None]
    constant = length <= eps
    divisor = torch.where(constant, eps, length)
    u = unit(x, eps)
    tangent = grad - torch.where(constant, 0, u * (u * grad).sum(-1, keepdim=True))
    return torch.where(divisor == 0, 0, tangent / torch.where(divisor == 0, 1, divisor)).to(dtype)
