"""Projection onto the span of each basis: S_c S_cᵀ x_b, or the rest, x_b − S_c S_cᵀ x_b."""

import torch
from torch import Tensor

from weft.reference.pairwise.subspace_logits import upcast


def subspace_project(x: Tensor, bases: Tensor, complement: bool = False) -> Tensor:
    """(B, D) × (C, D, k) -> (B, C, D), half precision in float32."""
    dtype = x.dtype
    x, bases = upcast(x, bases)
    projected = torch.einsum("bck,cdk->bcd", torch.einsum("bd,cdk->bck", x, bases), bases)
    return (x[:, None] - projected if complement else projected).to(dtype)


def subspace_project_backward(
    grad: Tensor, x: Tensor, bases: Tensor, complement: bool = False
) -> tuple[Tensor, Tensor]:
    """z = S_cᵀx, q = S_cᵀg:   ∂x = Σ_c S_c q_c (or g_c − S_c q_c),   ∂S_c = ± Σ_b (x qᵀ + g zᵀ)."""
    dtype = x.dtype
    grad, x, bases = upcast(grad, x, bases)
    z = torch.einsum("bd,cdk->bck", x, bases)
    q = torch.einsum("bcd,cdk->bck", grad, bases)
    grad_x = torch.einsum("bck,cdk->bd", q, bases)
    grad_bases = torch.einsum("bd,bck->cdk", x, q) + torch.einsum("bcd,bck->cdk", grad, z)
    if complement:
        grad_x, grad_bases = grad.sum(1) - grad_x, -grad_bases
    return grad_x.to(dtype), grad_bases.to(dtype)
