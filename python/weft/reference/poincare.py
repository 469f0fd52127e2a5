"""The Poincaré ball of curvature −c: its gyrovector space, geodesics and conformal factor.

The ball is ``√c ‖x‖ < 1``, a point is a last dimension, everything before it broadcasts. Half
precision is computed in float32. Each function of a norm is written as one of its square, which is
analytic at 0: derivatives of any order, and those by c, are finite for zero vectors.
"""

import math

import torch
from torch import Tensor

# How far from the boundary points are kept: 1 − c‖x‖² then has digits left after its subtraction.
MARGIN = {torch.float64: 1e-5, torch.float32: 4e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

# Taylor coefficients in t of tanh(√t)/√t, artanh(√t)/√t and asinh(√t)/√t.
_TANH = (1, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075)
_ARTANH = (1, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13, 1 / 15)
_ASINH = (1, -1 / 6, 3 / 40, -15 / 336, 105 / 3456, -945 / 42240, 10395 / 599040, -135135 / 9676800)
_SMALL = 2e-3  # below it the series are exact to a rounding of float64, also in their derivatives


def widened(*operands: Tensor | float) -> list:
    """The tensors in one dtype, float32 or wider; numbers as they are."""
    tensors = [x for x in operands if isinstance(x, Tensor)]
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) if isinstance(x, Tensor) else x for x in operands]


def _squared(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _of_square(t: Tensor, function, series) -> Tensor:
    """function(√t)/√t, by its series where t is small."""
    small = t < _SMALL
    root = torch.where(small, 1.0, t).sqrt()
    near = torch.where(small, t, 0.0)
    sum_ = torch.full_like(near, series[-1])
    for coefficient in series[-2::-1]:
        sum_ = sum_ * near + coefficient
    return torch.where(small, sum_, function(root) / root)


def _artanh(r: Tensor) -> Tensor:
    return r.clamp(max=1 - torch.finfo(r.dtype).eps).atanh()


def depth(x: Tensor, c) -> Tensor:
    """1 − c‖x‖², which stays positive."""
    return (1 - c * _squared(x)).clamp(min=torch.finfo(x.dtype).eps)


def project(x: Tensor, c, margin: float | None = None) -> Tensor:
    (wide, c_) = widened(x, c)
    limit = 1 - (MARGIN[x.dtype] if margin is None else margin)
    t = c_ * _squared(wide)
    outside = t > limit * limit
    root = torch.where(outside, t, 1.0).sqrt()
    return torch.where(outside, wide * (limit / root), wide).to(x.dtype)


def add(x: Tensor, y: Tensor, c) -> Tensor:
    xx, yy, xy = _squared(x), _squared(y), _dot(x, y)
    top = (1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y
    return top / (1 + 2 * c * xy + c * c * xx * yy).clamp(min=torch.finfo(top.dtype).tiny)


def gyration(u: Tensor, v: Tensor, w: Tensor, c) -> Tensor:
    """gyr[u, v] w = −(u ⊕ v) ⊕ (u ⊕ (v ⊕ w)), a rotation, for any vector w."""
    uu, vv, uv = _squared(u), _squared(v), _dot(u, v)
    uw, vw = _dot(u, w), _dot(v, w)
    a = c * vw + 2 * c * c * uv * vw - c * c * uw * vv
    b = -c * uw - c * c * vw * uu
    below = (1 + 2 * c * uv + c * c * uu * vv).clamp(min=torch.finfo(w.dtype).tiny)
    return w + 2 * (a * u + b * v) / below


def exp0(v: Tensor, c) -> Tensor:
    return v * _of_square(c * _squared(v), torch.tanh, _TANH)


def log0(y: Tensor, c) -> Tensor:
    return y * _of_square(c * _squared(y), _artanh, _ARTANH)


def exp(x: Tensor, v: Tensor, c) -> Tensor:
    return add(x, exp0(v / depth(x, c), c), c)


def log(x: Tensor, y: Tensor, c) -> Tensor:
    return depth(x, c) * log0(add(-x, y, c), c)


def transport(x: Tensor, y: Tensor, v: Tensor, c) -> Tensor:
    """v, tangent at x, carried along the geodesic to y."""
    return depth(y, c) / depth(x, c) * gyration(y, -x, v, c)


def distance(x: Tensor, y: Tensor, c) -> Tensor:
    square = _squared(x - y) / (depth(x, c) * depth(y, c))
    equal = square == 0
    root = torch.where(equal, 1.0, square).sqrt().masked_fill(equal, 0)
    return (2 * root * _of_square(c * square, torch.asinh, _ASINH)).squeeze(-1)


def midpoint(x: Tensor, weights: Tensor | None, c) -> Tensor:
    factor = 2 / depth(x, c)
    heavy = factor if weights is None else factor * weights[..., None]
    mass = heavy - (1 if weights is None else weights[..., None])
    top, bottom = (heavy * x).sum(-2), mass.sum(-2)
    # √(T² − c‖S‖²) > 0, the length of a sum of vectors in the cone of the future
    gap = (bottom.square() - c * _squared(top)).clamp(min=torch.finfo(x.dtype).tiny)
    return top / (bottom + gap.sqrt())


def hyperplane_scores(x: Tensor, z: Tensor, r: Tensor, c) -> Tensor:
    """v_k of Hyperbolic Neural Networks++; z ``(K, D)``, r ``(K,)``."""
    root = c.sqrt() if isinstance(c, Tensor) else math.sqrt(c)
    norms = _squared(z)
    zero = norms == 0
    length = torch.where(zero, 1.0, norms).sqrt()
    factor = 2 / depth(x, c)
    angle = 2 * root * r
    inner = root * factor * torch.nn.functional.linear(x, z / length)
    signed = torch.asinh(inner * angle.cosh() - (factor - 1) * angle.sinh())
    return 2 / root * length.masked_fill(zero, 0).squeeze(-1) * signed
