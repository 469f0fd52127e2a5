"""Potentials and parameters of other transport packages in the conventions of weft, and back.

Here P_ij = a_i b_j e^((f_i + g_j − C_ij) / ε): the regulariser is KL(P | a bᵀ), the weights are not
in the potentials, and the squared distance has no factor ½.

=========  =============================================================  =========================
package    plan                                                           squared Euclidean cost
=========  =============================================================  =========================
POT        u_i v_j e^(−C_ij / reg), entropy: the same plan as ours         ‖x − y‖², reg = ε
OTT        e^((f_i + g_j − C_ij) / ε)                                     ‖x − y‖²
GeomLoss   a_i b_j e^((F_i + G_j − C_ij) / blur^p)                        ½ ‖x − y‖² for p = 2
=========  =============================================================  =========================
"""

from typing import NamedTuple

import torch
from torch import Tensor


class GeomLossParameters(NamedTuple):
    """What GeomLoss calls ``blur`` and ``reach`` as ε and ρ of weft, and the factor of potentials
    and values: 2 for p = 2 (whose cost is ½ ‖x − y‖²), 1 for p = 1."""

    epsilon: float
    rho: float | None
    factor: float


def from_pot(
    log_u: Tensor, log_v: Tensor, a: Tensor, b: Tensor, epsilon: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(f, g) from the logarithms of POT's scalings (its ``log["u"]`` and ``log["v"]``, or
    ``log["log_u"]``): f = ε (log u − log a). Weights of 0 have no scaling: their f is NaN."""
    return epsilon * (log_u - a.log()), epsilon * (log_v - b.log())


def to_pot(
    f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(log u, log v), −∞ for a weight of 0."""
    return f / epsilon + a.log(), g / epsilon + b.log()


def from_ott(
    f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(f, g) from OTT's potentials, which have the weights in them: f − ε log a."""
    return f - epsilon * a.log(), g - epsilon * b.log()


def to_ott(
    f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: float | Tensor
) -> tuple[Tensor, Tensor]:
    """OTT's potentials, −∞ for a weight of 0."""
    return f + epsilon * a.log(), g + epsilon * b.log()


def from_geomloss(blur: float, reach: float | None = None, p: int = 2) -> GeomLossParameters:
    """ε and ρ that make ``weft.sinkhorn_points(x, y, a, b, cost="sqeuclidean")`` (p = 2) or
    ``cost="euclidean"`` (p = 1) the transport of ``SamplesLoss("sinkhorn", p, blur, reach)``; its
    potentials and values times ``factor`` are ours.

    GeomLoss stops after one update at each ε of a schedule: it is near the optimum only where
    ``scaling`` is near 1.
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    for name, value in (("blur", blur), ("reach", reach)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    factor = float(p)
    rho = None if reach is None else factor * reach**p
    return GeomLossParameters(factor * blur**p, rho, factor)


def to_geomloss(epsilon: float, rho: float | None = None, p: int = 2) -> tuple[float, float | None]:
    """(blur, reach) from ε and ρ: the inverse of ``from_geomloss``."""
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    return (epsilon / p) ** (1 / p), None if rho is None else (rho / p) ** (1 / p)


def potentials_of_geomloss(F: Tensor, G: Tensor, p: int = 2) -> tuple[Tensor, Tensor]:
    """(f, g) from the potentials of ``SamplesLoss(..., potentials=True, debias=False)``."""
    return p * torch.as_tensor(F), p * torch.as_tensor(G)
