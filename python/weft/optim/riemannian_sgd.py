"""Momentum descent that keeps manifold parameters on their manifold."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from weft.ops.pairwise.grassmann_step import grassmann_step_
from weft.optim.manifold import ManifoldParameter
from weft.reference import poincare
from weft.reference.pairwise.grassmann_step import REORTH, orthonormalized
from weft.reference.pairwise.subspace_logits import upcast
from weft.reference.poincare import MARGIN


class RiemannianSGD(Optimizer):
    r"""SGD with momentum that keeps each :class:`weft.ManifoldParameter` on its manifold.

    All other parameters move exactly as under ``torch.optim.SGD``. With gradient g, buffer G (the
    momentum) and the projection :math:`\Pi_P` onto the tangent space at P,

    .. math::
        G &\leftarrow \text{momentum} \cdot G + (1 - \text{dampening}) \, g
            \qquad (G \leftarrow g \text{ in the first step}) \\
        P &\leftarrow \text{the end of the path from } P \text{ along } -\text{lr} \cdot \Pi_P G

    On the Grassmann manifold the path is a geodesic, and :math:`\Pi_P G` carried along it is the
    new buffer, in one pass over memory: :func:`weft.grassmann_step`. On the Stiefel and orthogonal
    manifolds :math:`\Pi_P G = G - P\,\mathrm{sym}(P^\top G)`, the path is straight and its end made
    orthonormal, and the buffer is projected onto the tangent space there. On the Poincaré ball g is
    divided by the square of the conformal factor, the path is a geodesic, the buffer is carried
    along it, and points are kept off the boundary. A manifold parameter has no weight decay.

    Args:
        params: parameters or groups; every option below can differ between groups.
        lr: learning rate, >= 0. Schedulers of ``torch.optim.lr_scheduler`` apply.
        momentum, dampening, maximize: as in ``torch.optim.SGD``.
        weight_decay: of the parameters that are on no manifold.
        nesterov: likewise; a group with a manifold parameter refuses it.
        reorth: how rounding in a Grassmann basis is removed: ``"qr_signed"``, ``"polar"``,
            ``"newton_schulz"``, None, or ``"gcr"``, which repeats the paper's code step by step:
            Euclidean momentum, and a QR that may flip columns (see :func:`weft.grassmann_step` for
            what that costs). Stiefel steps end in a polar decomposition for ``"polar"`` and
            ``"newton_schulz"``, else in a QR with a positive diagonal.
        reorth_every: steps between two re-orthonormalisations, counted for each parameter; the
            first step has one.

    Raises:
        ValueError: options out of range.

    Source: Wang et al., "Get the Best of Both Worlds: Improving Accuracy and Transferability by
    Grassmann Class Representation", ICCV 2023, algorithm 1; Bonnabel, "Stochastic Gradient Descent
    on Riemannian Manifolds", 2013.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        reorth: str | None = "qr_signed",
        reorth_every: int = 5,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "reorth": reorth,
            "reorth_every": reorth_every,
        }
        super().__init__(params, options)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step; returns the loss of ``closure``, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            self._plain([p for p in with_grad if not isinstance(p, ManifoldParameter)], group)
            for p in with_grad:
                if isinstance(p, ManifoldParameter):
                    self._on_manifold(p, group)
        return loss

    def _plain(self, params: list[Tensor], group: dict) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        sgd(
            params,
            [p.grad for p in params],
            buffers,
            has_sparse_grad=any(p.grad.is_sparse for p in params),
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for p, buffer in zip(params, buffers, strict=True):
            if buffer is not None:
                self.state[p]["momentum_buffer"] = buffer

    def _on_manifold(self, p: ManifoldParameter, group: dict) -> None:
        if p.kind == "poincare":
            return _poincare(p, self.state[p], group)
        state, momentum = self.state[p], group["momentum"]
        count = state["step"] = state.get("step", -1) + 1
        grad: Tensor | None = p.grad
        buffer = state.get("momentum_buffer")
        if momentum == 0:  # the direction is the gradient, which is not written to
            buffer, grad = grad, None
        elif buffer is None:
            buffer = state["momentum_buffer"] = torch.clone(grad).contiguous()
            grad = None
        move = _grassmann if p.kind == "grassmann" else _stiefel
        move(p, buffer, grad, group, count)


def _grassmann(p: ManifoldParameter, buffer: Tensor, grad: Tensor | None, group: dict, count: int):
    if p.dims is not None and p.dims.device != p.device:
        p.dims = p.dims.to(p.device)
    grassmann_step_(
        _columns(p),
        _columns(buffer),
        _signed_lr(group),
        grad=None if grad is None else _columns(grad),
        momentum=group["momentum"],
        dampening=group["dampening"],
        dims=None if p.dims is None else p.dims.reshape(-1),
        reorth=group["reorth"] if count % group["reorth_every"] == 0 else None,
        transport=group["momentum"] != 0 and group["reorth"] != "gcr",
    )


def _stiefel(p: ManifoldParameter, buffer: Tensor, grad: Tensor | None, group: dict, count: int):
    step = buffer
    if grad is not None:
        step = group["momentum"] * buffer + (1 - group["dampening"]) * grad
    points, step = upcast(_columns(p), _columns(step))
    tangent = _tangent(points, step)
    method = group["reorth"] if group["reorth"] in ("polar", "newton_schulz") else "qr_signed"
    points = orthonormalized(points - _signed_lr(group) * tangent, None, method)
    _columns(p).copy_(points)
    if group["momentum"] != 0:
        _columns(buffer).copy_(_tangent(points, tangent))


def _poincare(p: ManifoldParameter, state: dict, group: dict) -> None:
    c = p.curvature
    point, grad = poincare.widened(p.detach(), p.grad)
    step = grad * (poincare.depth(point, c) / 2).square()
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        step = group["momentum"] * buffer + (1 - group["dampening"]) * step
    moved = poincare.project(poincare.exp(point, -_signed_lr(group) * step, c), c, MARGIN[p.dtype])
    if group["momentum"] != 0:
        state["momentum_buffer"] = poincare.transport(point, moved, step, c).to(p.dtype)
    p.copy_(moved)


def _columns(rows: Tensor) -> Tensor:
    """(..., k, D) as a view (C, D, k), the matrices of the formulas."""
    return rows.detach().reshape(-1, *rows.shape[-2:]).mT


def _tangent(points: Tensor, step: Tensor) -> Tensor:
    """G − P sym(PᵀG): G without what would change the products of the columns."""
    inner = points.mT @ step
    return step - points @ ((inner + inner.mT) / 2)


def _signed_lr(group: dict) -> float:
    return float(group["lr"]) * (-1 if group["maximize"] else 1)


def _check(group: dict) -> None:
    for name in ("lr", "momentum", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {group[name]}")
    if not -math.inf < group["dampening"] < math.inf:
        raise ValueError(f"dampening must be finite, got {group['dampening']}")
    if group["reorth"] not in REORTH:
        raise ValueError(f"reorth must be one of {REORTH}, got {group['reorth']!r}")
    if not (isinstance(group["reorth_every"], int) and group["reorth_every"] >= 1):
        raise ValueError(f"reorth_every must be an integer >= 1, got {group['reorth_every']!r}")
    if group["nesterov"]:
        if group["momentum"] == 0 or group["dampening"] != 0:
            raise ValueError("nesterov needs a momentum and no dampening")
        if any(isinstance(p, ManifoldParameter) for p in group["params"]):
            raise ValueError("nesterov is not defined on a manifold: use a group apart")
    for p in group["params"]:
        if isinstance(p, ManifoldParameter) and p.kind != "poincare" and not p.is_contiguous():
            raise ValueError("a manifold parameter must be contiguous: it is stepped in place")
