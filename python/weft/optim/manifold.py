"""Parameters that live on a manifold, and that say so to the optimizer."""

import math

import torch
from torch import Tensor
from torch.nn import Parameter

KINDS = ("grassmann", "stiefel", "orthogonal", "poincare")


class ManifoldParameter(Parameter):
    r"""A parameter whose rows ``data[..., :, :]``, ``(k, D)``, stay orthonormal or in a ball.

    :class:`weft.optim.RiemannianSGD` steps along the manifold; any other optimizer leaves it. The
    kind survives ``deepcopy``, ``pickle``, ``torch.save`` and ``Module.to``; a ``state_dict`` holds
    the plain tensor, as of any parameter.

    Args:
        data: ``(..., k, D)`` with ``k <= D``: rows are orthonormal, each matrix is a point. This is
            the transpose of the ``(D, k)`` of the formulas, and the layout that products want.
        kind: ``"grassmann"``: the span of the rows counts, not the rows. ``"stiefel"``: the rows
            count. ``"orthogonal"``: Stiefel with ``k = D``. ``"poincare"``: each row of
            data ``(..., D)`` is a point of the ball ``curvature * ||x||^2 < 1``.
        requires_grad: as of ``torch.nn.Parameter``.
        dims: number of rows in use of each matrix (Grassmann only), ``data.shape[:-2]``, int64; the
            rows after them are 0 and stay so. None: all.
        curvature: c > 0 of the Poincaré ball, a constant; the others do not use it.

    Raises:
        ValueError: an unknown kind, shapes that do not fit, a curvature that is not positive.
        TypeError: data that is not a floating-point tensor, dims that are not int64.
    """

    kind: str
    dims: Tensor | None
    curvature: float

    def __new__(
        cls,
        data: Tensor,
        kind: str = "grassmann",
        requires_grad: bool = True,
        *,
        dims: Tensor | None = None,
        curvature: float = 1.0,
    ):
        if not isinstance(data, Tensor) or not data.is_floating_point():
            raise TypeError(f"data must be a floating-point tensor, got {data!r:.60}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if not 0 < curvature < math.inf:
            raise ValueError(f"curvature must be finite and > 0, got {curvature}")
        if kind == "poincare":
            if data.dim() < 1:
                raise ValueError("data must be (..., D) on the Poincaré ball, got a number")
        elif data.dim() < 2 or data.shape[-2] > data.shape[-1]:
            raise ValueError(f"data must be (..., k, D) with k <= D, got {tuple(data.shape)}")
        if kind == "orthogonal" and data.shape[-2] != data.shape[-1]:
            raise ValueError(f"data must be (..., D, D) if orthogonal, got {tuple(data.shape)}")
        if dims is not None:
            _check_dims(dims, data, kind)
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.kind, self.dims, self.curvature = kind, dims, float(curvature)
        return self

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            data = self.data.clone(memory_format=torch.preserve_format)
            memo[id(self)] = type(self)(
                data, self.kind, self.requires_grad, dims=self.dims, curvature=self.curvature
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.data, self.kind, self.requires_grad, self.dims, self.curvature)

    def __repr__(self):
        return f"ManifoldParameter on {self.kind} containing:\n{self.data!r}"


def _rebuild(data, kind, requires_grad, dims, curvature=1.0):
    return ManifoldParameter(data, kind, requires_grad, dims=dims, curvature=curvature)


torch.serialization.add_safe_globals([_rebuild, ManifoldParameter])


def _check_dims(dims: Tensor, data: Tensor, kind: str) -> None:
    if kind != "grassmann":
        raise ValueError(f"dims are of the Grassmann manifold, not of {kind!r}")
    if not isinstance(dims, Tensor) or dims.dtype != torch.int64:
        raise TypeError(f"dims must be an int64 tensor, got {getattr(dims, 'dtype', type(dims))}")
    if dims.shape != data.shape[:-2]:
        raise ValueError(f"dims must be {tuple(data.shape[:-2])}, got {tuple(dims.shape)}")
