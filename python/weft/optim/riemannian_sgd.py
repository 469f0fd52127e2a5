"""Momentum descent that keeps manifold parameters on their manifold."""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from weft.optim.manifold import ManifoldParameter
from weft.ops.pairwise.grassmann_step import grassmann_step_
from weft.reference.pairwise.grassmann_step import REORTH


class RiemannianSGD(Optimizer):
    r"""SGD with momentum: geodesic steps for :class:`weft.ManifoldParameter`, plain ones for others.

    Parameters that are no ``ManifoldParameter`` move exactly as under ``torch.optim.SGD``. For the
    others, with gradient g and buffer G (the momentum),

    .. math::
        G &\leftarrow \text{momentum} \cdot G + (1 - \text{dampening}) \, g
            \qquad (G \leftarrow g \text{ in the first step}) \\
        P &\leftarrow \text{the end of the geodesic from } P \text{ along }
            -\text{lr} \cdot \Pi_P G

    with :math:`\Pi_P` the projection onto the tangent space: see :func:`weft.grassmann_step` for the
    Grassmann manifold, whose momentum is carried along the geodesic. On the Stiefel and orthogonal
    manifolds :math:`\Pi_P G = G - P\,\mathrm{sym}(P^\top G)`, the step is a QR retraction, and the
    momentum is projected onto the tangent space at its end. There is no weight decay on a manifold:
    its points have one length.

    Args:
        params: parameters or groups; every option below can differ between groups.
        lr: learning rate, >= 0. Schedulers of ``torch.optim.lr_scheduler`` apply.
        momentum, dampening: as in ``torch.optim.SGD``.
        weight_decay: of the parameters that are on no manifold.
        reorth: how rounding in a Grassmann basis is removed: one of
            ``"qr_signed"``, ``"polar"``, ``"newton_schulz"``, None, or ``"gcr"``, which repeats the
            paper's code step by step: Euclidean momentum, and a QR that may flip columns (see
            :func:`weft.grassmann_step` for what that costs).
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
        params,
        lr: float,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        reorth: str | None = "qr_signed",
        reorth_every: int = 5,
    ):
        options = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            reorth=reorth,
            reorth_every=reorth_every,
        )
        super().__init__(params, options)
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self, closure=None):
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
                    move = self._grassmann if p.kind == "grassmann" else self._stiefel
                    move(p, self.state[p], group)
        return loss

    def _plain(self, params: list[Tensor], group: dict) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        sgd(
            params,
            [p.grad for p in params],
            buffers,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=False,
            maximize=False,
        )
        for p, buffer in zip(params, buffers, strict=True):
            if buffer is not None:
                self.state[p]["momentum_buffer"] = buffer

    def _grassmann(self, p: ManifoldParameter, state: dict, group: dict) -> None:
        count = state["step"] = state.get("step", -1) + 1
        first = "momentum_buffer" not in state
        buffer = torch.zeros_like(p) if first else state["momentum_buffer"]
        if group["momentum"] != 0:
            state["momentum_buffer"] = buffer
        matrices = (-1, *p.shape[-2:])
        dims = None if p.dims is None else p.dims.to(p.device)
        grassmann_step_(
            p.data.view(matrices).mT,
            buffer.view(matrices).mT,
            float(group["lr"]),
            grad=p.grad.reshape(matrices).mT,
            momentum=group["momentum"],
            dampening=0.0 if first else group["dampening"],
            dims=dims,
            reorth=group["reorth"] if count % group["reorth_every"] == 0 else None,
            transport=group["reorth"] != "gcr" and group["momentum"] != 0,
        )

    def _stiefel(self, p: ManifoldParameter, state: dict, group: dict) -> None:
        rows, momentum = p.data, group["momentum"]
        step = p.grad
        if "momentum_buffer" in state:
            step = momentum * state["momentum_buffer"] + (1 - group["dampening"]) * p.grad
        tangent = _tangent(rows, step)
        rows.copy_(_qr_rows(rows - float(group["lr"]) * tangent))
        if momentum != 0:
            state["momentum_buffer"] = _tangent(rows, tangent)


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


def _tangent(rows: Tensor, step: Tensor) -> Tensor:
    """G − sym(G Pᵀ) P for P with orthonormal rows: G without what would change their products."""
    inner = step @ rows.mT
    return step - (inner + inner.mT) / 2 @ rows


def _qr_rows(rows: Tensor) -> Tensor:
    """Orthonormal rows: Q of the QR of the transposes, with a positive diagonal of R."""
    wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    q, r = torch.linalg.qr(wide.mT)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs[..., None, :]).mT
