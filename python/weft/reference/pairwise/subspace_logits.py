"""Grassmann class representation: the logit of a class is the length of the projection onto it.

û_b = x_b / max(‖x_b‖, eps) if normalize else x_b
z_bc = S_cᵀ û_b  ∈ R^k,        logit_bc = γ ‖z_bc‖   or, squared,   γ ‖z_bc‖²
"""

import torch
from torch import Tensor


def norm(z: Tensor) -> Tensor:
    """‖z‖ over the last dimension, without overflow or underflow; every derivative at 0 is 0."""
    scale, zero = _scale(z)
    square = (z / scale).square().sum(-1).masked_fill(zero, 1)
    return (square.sqrt() * scale.squeeze(-1)).masked_fill(zero, 0)


def unit(z: Tensor, eps: float = 0.0) -> Tensor:
    """z / max(‖z‖, eps) over the last dimension; without eps 0 at 0, with every derivative."""
    scale, zero = _scale(z)
    z = z / scale
    length = z.square().sum(-1).masked_fill(zero, 1).sqrt()
    if eps:
        return z / torch.maximum(length, eps / scale.squeeze(-1))[..., None]
    return (z / length[..., None]).masked_fill(zero[..., None], 0)


def _scale(z: Tensor) -> tuple[Tensor, Tensor]:
    """The largest |z| of the last dimension (1 where that is 0 or not finite), and where z = 0."""
    largest = z.detach().abs().amax(-1) if z.shape[-1] else z.new_zeros(z.shape[:-1])
    zero = largest == 0
    usable = torch.isfinite(largest) & ~zero
    return largest.masked_fill(~usable, 1)[..., None], zero


def mask_columns(bases: Tensor, dims: Tensor | None) -> Tensor:
    """Zeros in the columns ``bases[c, :, dims[c]:]``, whatever they held."""
    if dims is None:
        return bases
    unused = torch.arange(bases.shape[2], device=bases.device) >= dims[:, None]
    return bases.masked_fill(unused[:, None, :], 0)


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half-precision inputs are computed in float32."""
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def subspace_projections(
    x: Tensor,
    bases: Tensor,
    dims: Tensor | None = None,
    normalize: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """z_bc = S_cᵀ û_b: (B, D) × (C, D, k) -> (B, C, k), half precision in float32."""
    x, bases = upcast(x, mask_columns(bases, dims))
    return torch.einsum("bd,cdk->bck", unit(x, eps) if normalize else x, bases)


def logits_of_projections(z: Tensor, gamma: float = 1.0, squared: bool = False) -> Tensor:
    return gamma * (z.square().sum(-1) if squared else norm(z))


def subspace_logits(
    x: Tensor,
    bases: Tensor,
    dims: Tensor | None = None,
    gamma: float = 1.0,
    squared: bool = False,
    normalize: bool = False,
    eps: float = 0.0,
) -> Tensor:
    z = subspace_projections(x, bases, dims, normalize, eps)
    return logits_of_projections(z, gamma, squared).to(x.dtype)


def subspace_logits_backward(
    grad: Tensor,
    x: Tensor,
    bases: Tensor,
    dims: Tensor | None = None,
    gamma: float = 1.0,
    squared: bool = False,
    normalize: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q = ∂/∂z = γ g z/‖z‖ (or 2γ g z);  ∂S_c = Σ_b û_b q_bcᵀ;  ∂û_b = Σ_c S_c q_bc."""
    dtype = x.dtype
    grad, x, bases = upcast(grad, x, mask_columns(bases, dims))
    u = unit(x, eps) if normalize else x
    z = torch.einsum("bd,cdk->bck", u, bases)
    q = gamma * grad[..., None] * (2 * z if squared else unit(z))
    grad_bases = torch.einsum("bd,bck->cdk", u, q)
    grad_x = torch.einsum("bck,cdk->bd", q, bases)
    if normalize:
        length = norm(x)[:, None]
        outside = ~(length <= eps)  # inside, the divisor is the constant eps
        tangent = grad_x - u * (u * grad_x).sum(-1, keepdim=True)
        inside = grad_x if eps else torch.zeros_like(grad_x)
        grad_x = torch.where(outside, tangent, inside) / length.masked_fill(~outside, eps or 1.0)
    return grad_x.to(dtype), mask_columns(grad_bases, dims).to(dtype)
