"""Pair functions: a number s_ij for each row x_i of one matrix and y_j of another.

u_ij = ⟨x_i, y_j⟩  or  ‖x_i − y_j‖²  or  ‖x_i − y_j‖₁                      (base)
v_ij = scale · α_i · β_j · u_ij + bias_j + shift                            (factors, bias)
s_ij = f(v_ij)                                                              (function)

    identity   v
    root       √v                               derivative 0 at v = 0
    exp        e^−v
    log_ratio  log((v + 1) / (v + parameter))
    arcosh     parameter · arcosh(1 + v)        derivative 0 at v = 0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.reference.pairwise.subspace_logits import upcast

BASES = ("dot", "sqeuclidean", "l1")
FUNCTIONS = ("identity", "root", "exp", "log_ratio", "arcosh")


@dataclass(frozen=True)
class Pair:
    """What a schema carries of a pair function; the tensors α, β and bias are arguments of their
    own."""

    base: str
    function: str = "identity"
    scale: float = 1.0
    shift: float = 0.0
    parameter: float = 0.0


def apply_function(v: Tensor, function: str, parameter: float) -> Tensor:
    if function == "identity":
        return v
    if function == "exp":
        return (-v).exp()
    if function == "log_ratio":
        return ((v + 1) / (v + parameter)).log()
    zero = v <= 0  # no derivative there, and none of the square root of a rounding error
    safe = v.masked_fill(zero, 1)
    if function == "root":
        return safe.sqrt().masked_fill(zero, 0)
    w = safe + (safe * (safe + 2)).sqrt()
    return parameter * w.log1p().masked_fill(zero, 0)


def base_values(x: Tensor, y: Tensor, base: str) -> Tensor:
    """u: (..., D) and (..., D), broadcast, to (...). Differences are formed: nothing cancels."""
    if base == "dot":
        return (x * y).sum(-1)
    difference = x - y
    return (difference.square() if base == "sqeuclidean" else difference.abs()).sum(-1)


def pair_values(
    x: Tensor,
    y: Tensor,
    pair: Pair,
    row_factor: Tensor | None = None,
    column_factor: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """s for all pairs: (N, D) × (M, D) -> (N, M), half precision in float32."""
    x, y = upcast(x, y)
    u = x @ y.mT if pair.base == "dot" else base_values(x[:, None], y[None], pair.base)
    v = pair.scale * u
    if row_factor is not None:
        v = v * row_factor[:, None]
    if column_factor is not None:
        v = v * column_factor
    if bias is not None:
        v = v + bias
    return apply_function(v + pair.shift, pair.function, pair.parameter)


def pair_values_at(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    columns: Tensor,
    pair: Pair,
    row_factor: Tensor | None = None,
    column_factor: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """s of the pairs (rows[e], columns[e]) only, in the shape of ``rows``."""
    x, y = upcast(x, y)
    v = pair.scale * base_values(x[rows], y[columns], pair.base)
    if row_factor is not None:
        v = v * row_factor[rows]
    if column_factor is not None:
        v = v * column_factor[columns]
    if bias is not None:
        v = v + bias[columns]
    return apply_function(v + pair.shift, pair.function, pair.parameter)


def allowed_pairs(
    N: int,
    M: int,
    device: torch.device,
    mask: Tensor | None = None,
    x_labels: Tensor | None = None,
    y_labels: Tensor | None = None,
    same: bool = True,
    off_diagonal: bool = False,
) -> Tensor | None:
    """(N, M) bool, True where every part allows the pair; None where all are allowed."""
    allowed = mask
    if x_labels is not None:
        of_labels = (x_labels[:, None] == y_labels) == same
        allowed = of_labels if allowed is None else allowed & of_labels
    if off_diagonal:
        distinct = torch.arange(N, device=device)[:, None] != torch.arange(M, device=device)
        allowed = distinct if allowed is None else allowed & distinct
    return allowed
