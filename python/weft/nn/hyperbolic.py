r"""The Poincaré ball: maps, distances, means, and layers.

The ball of curvature :math:`-c` is :math:`\sqrt c \lVert x \rVert < 1`, with the conformal factor
:math:`\lambda_x = 2 / (1 - c \lVert x \rVert^2)`. Points are a last dimension, the rest broadcasts.
``c`` is a number > 0, or a tensor of one element that may require a gradient. Nothing waits for
the device; half precision is computed in float32. A result can round onto the boundary:
:func:`project` brings it back. All functions raise ``TypeError`` for what is no floating-point
tensor, ``ValueError`` for a number c that is not positive or shapes that do not fit.
"""

import math

import torch
from torch import Tensor, nn

from weft.nn.checks import check_features, check_sizes
from weft.reference import poincare


def mobius_add(x: Tensor, y: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r"""The gyrovector sum.

    .. math::
        x \oplus y = \frac{(1 + 2c\langle x, y\rangle + c\lVert y\rVert^2)\, x
            + (1 - c\lVert x\rVert^2)\, y}
            {1 + 2c\langle x, y\rangle + c^2\lVert x\rVert^2\lVert y\rVert^2}
    """
    return _run(poincare.add, c, x=x, y=y)


def gyration(u: Tensor, v: Tensor, w: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r""":math:`\mathrm{gyr}[u, v] w = -(u \oplus v) \oplus (u \oplus (v \oplus w))`, all w."""
    return _run(poincare.gyration, c, u=u, v=v, w=w)


def expmap0(v: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r""":math:`\tanh(\sqrt c \lVert v\rVert)\, v / (\sqrt c \lVert v\rVert)`."""
    return _run(poincare.exp0, c, v=v)


def logmap0(y: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r""":math:`\text{artanh}(\sqrt c \lVert y\rVert)\, y / (\sqrt c \lVert y\rVert)`."""
    return _run(poincare.log0, c, y=y)


def expmap(x: Tensor, v: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r""":math:`x \oplus \exp_0(\lambda_x v / 2)`: the geodesic from x along v, after time 1."""
    return _run(poincare.exp, c, x=x, v=v)


def logmap(x: Tensor, y: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r""":math:`(2/\lambda_x) \log_0(-x \oplus y)`, the inverse of :func:`expmap`."""
    return _run(poincare.log, c, x=x, y=y)


def parallel_transport(x: Tensor, y: Tensor, v: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r""":math:`(\lambda_x/\lambda_y)\, \mathrm{gyr}[y, -x] v`: a tangent at x carried to y."""
    return _run(poincare.transport, c, x=x, y=y, v=v)


def distance(x: Tensor, y: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r"""The length of the geodesic, ``(...)``; all pairs of two sets: ``weft.pairwise_distance``.

    .. math::
        d(x, y) = \frac{2}{\sqrt c}\, \text{asinh} \sqrt{\frac{c \lVert x - y\rVert^2}
            {(1 - c\lVert x\rVert^2)(1 - c\lVert y\rVert^2)}}

    It keeps the digits of near points, which arcosh of 1 plus a little loses. The gradient at
    equal points is 0.
    """
    return _run(poincare.distance, c, x=x, y=y)


def conformal_factor(x: Tensor, c: float | Tensor = 1.0) -> Tensor:
    r""":math:`\lambda_x = 2 / (1 - c \lVert x\rVert^2)`, ``(..., 1)``.

    The quotient is the metric's, and what makes :func:`expmap` a geodesic.
    """
    return _run(lambda x, c: 2 / poincare.depth(x, c), c, x=x)


def project(x: Tensor, c: float | Tensor = 1.0, margin: float | None = None) -> Tensor:
    r"""Points pulled in to :math:`\sqrt c \lVert x\rVert \le 1 - \text{margin}`.

    The margin is by default 1e-5 in float64, 4e-3 in float32, 1e-2 in float16, 3e-2 in bfloat16.
    """
    _check_curvature(c)
    check_features("x", x)
    if margin is not None and not 0 < margin < 1:
        raise ValueError(f"margin must be in (0, 1), got {margin}")
    return poincare.project(x, c, margin)


def midpoint(x: Tensor, weights: Tensor | None = None, c: float | Tensor = 1.0) -> Tensor:
    r"""The gyromidpoint of N points, :math:`(..., N, D) \to (..., D)`.

    .. math::
        \tfrac12 \otimes \frac{\sum_i w_i \lambda_i x_i}{\sum_i w_i (\lambda_i - 1)}

    It is the normalised sum of the points on the hyperboloid. Weights ``(..., N)`` are >= 0, not
    all 0; None: all equal.
    """
    _check_curvature(c)
    check_features("x", x)
    if x.dim() < 2 or x.shape[-2] < 1:
        raise ValueError(f"x must be (..., N, D) with N >= 1, got {tuple(x.shape)}")
    if weights is not None:
        check_features("weights", weights, x.shape[-2])
    wide = poincare.widened(x, weights, c)
    return poincare.midpoint(*wide).to(x.dtype)


class PoincareClassifier(nn.Module):
    r"""Hyperbolic multinomial logistic regression: signed, scaled distances to hyperplanes.

    .. math::
        v_k = \frac{2 \lVert z_k\rVert}{\sqrt c}\, \text{asinh}\Bigl(\lambda_x
            \bigl\langle \sqrt c\, x, \tfrac{z_k}{\lVert z_k\rVert}\bigr\rangle
            \cosh(2\sqrt c\, r_k) - (\lambda_x - 1) \sinh(2\sqrt c\, r_k)\Bigr)

    Args:
        in_features: D.
        num_classes: K.
        curvature: c > 0.
        learn_curvature: whether c is learned, as the exponential of ``log_curvature``.
        bias: whether the offsets r are learned; else they are 0.
        device, dtype: of the parameters.

    Attributes:
        weight: z, ``(K, D)``. Both are Euclidean: any optimizer trains them.
        bias: r, ``(K,)``, or None.

    Shapes: points of the ball ``(..., D)``, logits ``(..., K)``.

    Raises:
        ValueError: sizes or a curvature that are not positive; inputs of another width.

    Source: Shimizu et al., "Hyperbolic Neural Networks++", ICLR 2021, the
    unidirectional v_k.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        curvature: float = 1.0,
        learn_curvature: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes)
        _check_curvature(curvature)
        self.in_features, self.out_features = in_features, num_classes
        kind = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, **kind))
        self.bias = nn.Parameter(torch.empty(num_classes, **kind)) if bias else None
        self.curvature = float(curvature)
        start = torch.full((), math.log(curvature), **kind) if learn_curvature else None
        self.log_curvature = None if start is None else nn.Parameter(start)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of deviation 1/(2√D), as v ≈ 4⟨x, z⟩ near the origin; no offset."""
        self.weight.normal_(std=0.5 / math.sqrt(self.in_features))
        if self.bias is not None:
            self.bias.zero_()

    def c(self) -> float | Tensor:
        """The curvature in use."""
        return self.curvature if self.log_curvature is None else self.log_curvature.exp()

    def _scores(self, x: Tensor) -> Tensor:
        check_features("x", x, self.in_features)
        r = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
        x, z, r, c = poincare.widened(x, self.weight, r, self.c())
        return poincare.hyperplane_scores(x, z, r, c)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self._scores(x).to(x.dtype)

    def extra_repr(self) -> str:
        c = "learned" if self.log_curvature is not None else self.curvature
        return f"in_features={self.in_features}, out_features={self.out_features}, curvature={c}"


class PoincareLinear(PoincareClassifier):
    r"""A linear layer from ball to ball: its scores are distances to the output's axes.

    .. math::
        w_k = \sinh(\sqrt c\, v_k) / \sqrt c, \qquad y = \frac{w}{1 + \sqrt{1 + c \lVert w\rVert^2}}

    with the :math:`v_k` of :class:`PoincareClassifier`, whose arguments it takes (``num_classes``
    is the width of the output). The result is projected into the ball.

    Shapes: points ``(..., D)`` to points ``(..., K)``.

    Source: Shimizu et al., "Hyperbolic Neural Networks++", ICLR 2021, the
    Poincaré fully connected layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            v = self._scores(x)
            (c,) = poincare.widened(self.c())
            root = c.to(v.dtype).sqrt() if isinstance(c, Tensor) else math.sqrt(c)
            # at 40 the point is on the boundary in any dtype, and the squares are finite
            w = (root * v).clamp(-40, 40).sinh() / root
            y = w / (1 + (1 + c * w.square().sum(-1, keepdim=True)).sqrt())
            return poincare.project(y, c, poincare.MARGIN[x.dtype]).to(x.dtype)


def _check_curvature(c: float | Tensor) -> None:
    if isinstance(c, Tensor):
        if c.numel() != 1 or not c.is_floating_point():
            raise ValueError(f"c must be one float, got {c.dtype}{tuple(c.shape)}")
    elif not 0 < c < math.inf:
        raise ValueError(f"c must be finite and > 0, got {c}")


def _run(function, c: float | Tensor, **points: Tensor) -> Tensor:
    _check_curvature(c)
    for name, point in points.items():
        check_features(name, point)
    widths = {point.shape[-1] for point in points.values()}
    if len(widths) > 1:
        raise ValueError(f"{', '.join(points)} must have one last dimension, got {sorted(widths)}")
    if isinstance(c, Tensor):
        c = c.reshape(())
    dtype = next(iter(points.values())).dtype
    for point in points.values():
        dtype = torch.promote_types(dtype, point.dtype)
    return function(*poincare.widened(*points.values(), c)).to(dtype)
