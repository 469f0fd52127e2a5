"""Momentum descent on the Grassmann manifold: P (D × k) orthonormal, momentum G, gradient g.

G ← μ G + (1 − τ) g,   H = G − P PᵀG,   HᵀH = V Λ Vᵀ,   α = −lr
P' = P V cos(α√Λ) Vᵀ + H V [sin(α√Λ)/√Λ] Vᵀ         the geodesic from P along αH, at its end
G' = H V cos(α√Λ) Vᵀ − P V [√Λ sin(α√Λ)] Vᵀ         H carried along with it: G'ᵀP' = 0
"""

import torch
from torch import Tensor

from weft.reference.pairwise.subspace_logits import mask_columns, upcast

REORTH = (None, "qr_signed", "polar", "newton_schulz", "gcr")
LONGEST_STEP = 2.0**20  # radians: a longer ‖αH‖_F has no direction left in any dtype


def grassmann_step(
    basis: Tensor,
    buffer: Tensor,
    grad: Tensor | None,
    dims: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    reorth: str | None,
    transport: bool,
) -> tuple[Tensor, Tensor]:
    """The new (basis, buffer) of classes (C, D, k); half precision in float32."""
    dtype = basis.dtype
    P, G = upcast(mask_columns(basis, dims), mask_columns(buffer, dims))
    if grad is not None:
        G = momentum * G + (1 - dampening) * mask_columns(grad, dims).to(G.dtype)
    if 0 in P.shape:
        return P.to(dtype), G.to(dtype)
    H = G - P @ (P.mT @ G)
    M = H.mT.double() @ H.double()
    M = M.masked_fill(~M.isfinite().all(-1).all(-1)[:, None, None], 0)  # a NaN of H stays in H
    eigenvalues, V = torch.linalg.eigh(M)
    eigenvalues = eigenvalues.clamp(min=0)
    length = (lr**2 * eigenvalues.sum(-1)).sqrt()[:, None]
    alpha = -lr * (LONGEST_STEP / length).clamp(max=1)
    angle = alpha * eigenvalues.sqrt()

    def of_eigenvalues(values: Tensor) -> Tensor:
        return (V @ (values[..., None] * V.mT)).to(P.dtype)

    cosine = of_eigenvalues(angle.cos())
    # sin θ/√λ = α sin θ/θ: torch's sinc has a π in it, and is 1 at 0.
    sine = of_eigenvalues(alpha * torch.sinc(angle / torch.pi))
    radial = of_eigenvalues(alpha * torch.sinc(angle / torch.pi) * eigenvalues)
    P_new = orthonormalized(P @ cosine + H @ sine, dims, reorth)
    G_new = H @ cosine - P @ radial if transport else G
    return mask_columns(P_new, dims).to(dtype), G_new.to(dtype)


def orthonormalized(P: Tensor, dims: Tensor | None, method: str | None) -> Tensor:
    """Orthonormal columns with the span of P (..., D, k)."""
    if method is None:
        return P
    if method == "newton_schulz":
        return _newton_schulz(P, dims)
    # Columns beyond dims are 0 and would stop a QR: unit vectors in k further rows replace them.
    padding = P.new_zeros(*P.shape[:-2], P.shape[-1], P.shape[-1])
    if dims is not None:
        unused = torch.arange(P.shape[-1], device=P.device) >= dims[:, None]
        padding = torch.diag_embed(unused.to(P.dtype))
    tall = torch.cat([P, padding], -2)
    if method == "polar":
        bad = ~tall.isfinite().all(-1).all(-1)[..., None, None]
        U, _, Vh = torch.linalg.svd(tall.masked_fill(bad, 0), full_matrices=False)
        return (U @ Vh)[..., : P.shape[-2], :].masked_fill(bad, torch.nan)
    Q, R = torch.linalg.qr(tall if dims is not None else P)
    if method == "qr_signed":
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return Q[..., : P.shape[-2], :]


def _newton_schulz(P: Tensor, dims: Tensor | None) -> Tensor:
    """S ← S (3 I − SᵀS)/2, until SᵀS was within √ε of I before a round."""
    identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    if dims is not None:
        used = torch.arange(P.shape[-1], device=P.device) < dims[:, None]
        identity = identity * used[:, None, :]
    near = 1e-8 if P.dtype == torch.float64 else 1e-4
    for round in range(60):
        gram = P.mT @ P
        distance = (gram - identity).flatten(-2).norm(dim=-1)[..., None, None]
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        scale = torch.where((distance > 1) & (round == 0), trace, 1)
        P = P @ (3 * identity - gram / scale) / (2 * scale.sqrt())
        if not (distance > near).any():
            break
    return P
