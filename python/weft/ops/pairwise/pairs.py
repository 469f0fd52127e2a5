"""The pair functions of the public API, by name, and the masks: what every op here takes apart.

``pair_of`` turns a name and its parameters into operands and the closed form that the kernels know
(weft.reference.pairwise.pairs): f(scale · α_i · β_j · base(x_i, y_j) + bias_j + shift).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.ops.checks import check_float, values_are_checked
from weft.ops.pairwise.unit_rows import unit_rows
from weft.reference.pairwise.pairs import Pair

PAIRS = (
    "dot",
    "cosine",
    "sqeuclidean",
    "euclidean",
    "l1",
    "rbf",
    "log",
    "mahalanobis",
    "poincare",
    "lorentz",
)
SCHEMA = (
    "Tensor x, Tensor y, Tensor? row_factor, Tensor? column_factor, Tensor? bias, "
    "str base, str function, float scale, float shift, float parameter"
)


@dataclass(frozen=True)
class Operands:
    """Arguments of an op in the order of ``SCHEMA``."""

    x: Tensor
    y: Tensor
    pair: Pair
    row_factor: Tensor | None = None
    column_factor: Tensor | None = None
    bias: Tensor | None = None

    def arguments(self) -> tuple:
        p = self.pair
        tensors = (self.x, self.y, self.row_factor, self.column_factor, self.bias)
        return (*tensors, p.base, p.function, p.scale, p.shift, p.parameter)


def check_rows(x: Tensor, y: Tensor) -> None:
    check_float(x=x, y=y)
    if x.dim() != 2:
        raise ValueError(f"x must be (N, D), got {tuple(x.shape)}")
    if y.dim() != 2 or y.shape[1] != x.shape[1]:
        raise ValueError(f"y must be (M, D) with D = {x.shape[1]}, got {tuple(y.shape)}")


def pair_of(
    name: str,
    x: Tensor,
    y: Tensor,
    *,
    scale: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    curvature: float | Tensor = 1.0,
    precision: Tensor | None = None,
    bias: Tensor | None = None,
) -> Operands:
    """Operands of the pair function ``name``; each reads the parameters it has.

    ===============  ==========================================================================
    dot              scale ⟨x, y⟩ + bias
    cosine           scale ⟨x, y⟩ / (‖x‖ ‖y‖) + bias, 0 for a zero vector
    sqeuclidean      ‖x − y‖²
    euclidean        ‖x − y‖
    l1               ‖x − y‖₁
    rbf              exp(−gamma ‖x − y‖²)
    log              log((‖x − y‖² + 1) / (‖x − y‖² + eps))
    mahalanobis      √((x − y)ᵀ P (x − y)), P = ``precision`` (D, D) positive definite
    poincare         arcosh(1 + 2c ‖x − y‖² / ((1 − c‖x‖²)(1 − c‖y‖²))) / √c, c = ``curvature``
    lorentz          arcosh(−c ⟨x, y⟩_L) / √c on the hyperboloid ⟨x, x⟩_L = −1/c, time first
    ===============  ==========================================================================
    """
    check_rows(x, y)
    if name not in PAIRS:
        raise ValueError(f"pair must be one of {', '.join(PAIRS)}, got {name!r}")
    if bias is not None:
        check_float(x=x, bias=bias)
        if name not in ("dot", "cosine"):
            raise ValueError(f"bias goes with dot and cosine, not with {name}")
        if bias.shape != (y.shape[0],):
            raise ValueError(f"bias must be ({y.shape[0]},), got {tuple(bias.shape)}")
    if name in ("dot", "cosine"):
        _check_number("scale", scale, positive=False)
        if name == "cosine":
            x, y = unit_rows(x), unit_rows(y)
        return Operands(x, y, Pair("dot", scale=float(scale)), bias=bias)
    if name == "l1":
        return Operands(x, y, Pair("l1"))
    if name == "sqeuclidean":
        return Operands(x, y, Pair("sqeuclidean"))
    if name == "euclidean":
        return Operands(x, y, Pair("sqeuclidean", "root"))
    if name == "rbf":
        _check_number("gamma", gamma)
        return Operands(x, y, Pair("sqeuclidean", "exp", scale=float(gamma)))
    if name == "log":
        _check_number("eps", eps)
        return Operands(x, y, Pair("sqeuclidean", "log_ratio", parameter=float(eps)))
    if name == "mahalanobis":
        return _mahalanobis(x, y, precision)
    return _hyperbolic(name, x, y, curvature)


def _check_number(name: str, value: float, positive: bool = True) -> None:
    if not abs(value) < math.inf or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and > 0' if positive else ''}, got {value}")


def _mahalanobis(x: Tensor, y: Tensor, precision: Tensor | None) -> Operands:
    if precision is None:
        raise ValueError("precision must be given for mahalanobis: the inverse covariance, (D, D)")
    check_float(x=x, precision=precision)
    D = x.shape[1]
    if precision.shape != (D, D):
        raise ValueError(f"precision must be ({D}, {D}), got {tuple(precision.shape)}")
    wide = precision.double()
    factor, failed = torch.linalg.cholesky_ex(wide)  # (x − y)ᵀ L Lᵀ (x − y)
    if not torch.compiler.is_compiling() and bool(failed):
        raise ValueError("precision must be symmetric positive definite")
    center = y.detach().double().mean(0) if y.shape[0] else 0  # the factor would enlarge an offset
    x, y = (((t.double() - center) @ factor).to(t.dtype) for t in (x, y))
    return Operands(x, y, Pair("sqeuclidean", "root"))


def _hyperbolic(name: str, x: Tensor, y: Tensor, curvature: float | Tensor) -> Operands:
    if isinstance(curvature, Tensor):
        raise TypeError("curvature must be a number here")
    _check_number("curvature", curvature)
    c = float(curvature)
    pair = Pair("sqeuclidean", "arcosh", scale=2 * c, parameter=1 / math.sqrt(c))
    if name == "poincare":
        row, column = (1 / (1 - c * wide_squares(t)) for t in (x, y))
        return Operands(x, y, pair, row, column)
    # ⟨x, y⟩_L = −x₀y₀ + Σ x_d y_d: a plain product once the time of x changes its sign.
    flipped = torch.cat([-x[:, :1], x[:, 1:]], 1)
    pair = Pair("dot", "arcosh", scale=-c, shift=-1.0, parameter=1 / math.sqrt(c))
    return Operands(flipped, y, pair)


def wide_squares(x: Tensor) -> Tensor:
    """‖x‖² of each row in the accumulation dtype: factors are float32 beside half precision."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return wide.square().sum(-1)


def hyperbolic_of_tensor(
    name: str, x: Tensor, y: Tensor, curvature: Tensor
) -> tuple[Operands, Tensor]:
    """poincare or lorentz where the curvature is a tensor that may require a gradient.

    A pair function's parameters are numbers, so c goes into the row factors, and 1/√c is left to
    the caller: s = factor · (that of the operands), with factor > 0.
    """
    check_rows(x, y)
    if not curvature.is_floating_point() or curvature.dim() or curvature.device != x.device:
        raise ValueError(
            f"curvature must be a number or a 0-d float tensor on {x.device}, got "
            f"{tuple(curvature.shape)} {curvature.dtype} on {curvature.device}"
        )
    if values_are_checked(curvature):
        _check_number("curvature", float(curvature.detach()))
    c = curvature.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if name == "poincare":
        row, column = (1 / (1 - c * wide_squares(t)) for t in (x, y))
        pair = Pair("sqeuclidean", "arcosh", parameter=1.0)
        return Operands(x, y, pair, 2 * c * row, column), c.rsqrt()
    flipped = torch.cat([-x[:, :1], x[:, 1:]], 1)
    pair = Pair("dot", "arcosh", shift=-1.0, parameter=1.0)
    return Operands(flipped, y, pair, (-c).expand(x.shape[0])), c.rsqrt()
