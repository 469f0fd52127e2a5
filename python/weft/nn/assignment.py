"""Balanced assignments of samples to prototypes, and the losses that learn from them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, full_precision
from weft.ops.pairwise.masks import PairMask
from weft.ops.pairwise.nearest import nearest
from weft.ops.transport.doubly_stochastic import doubly_stochastic

REDUCTIONS = ("mean", "sum", "none")


class SinkhornAssignment(nn.Module):
    r"""Soft assignments of a batch to prototypes, each prototype getting as much as any other.

    .. math::
        Q = e^{S / \varepsilon}, \quad T \text{ times: columns to } B/K, \text{ rows to } 1

    The target of a student: a row is a distribution over prototypes. No gradient passes.

    Args:
        epsilon: > 0, how soft: 0.05 in SwAV; in DINOv2 the temperature of the teacher, 0.04 that
            grows to 0.07, a plain attribute that may be set while training.
        iterations: T >= 1.
        group: the samples of all its ranks are assigned together; ranks may have different
            numbers of them (the masked tokens of iBOT).

    Shapes: scores ``(..., B, K)``, assignments alike, in float32 (float64 of float64).

    Raises:
        ValueError: epsilon or iterations out of range, shapes.
        TypeError: scores that are not floating-point.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments", NeurIPS 2020, algorithm 1; Oquab et al., "DINOv2: Learning Robust
    Visual Features without Supervision", TMLR 2024, section 4.
    """

    def __init__(
        self, epsilon: float = 0.05, iterations: int = 3, *, group: ProcessGroup | None = None
    ):
        super().__init__()
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be > 0 and finite, got {epsilon}")
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations must be an integer >= 1, got {iterations!r}")
        self.epsilon, self.iterations, self.group = epsilon, iterations, group

    @torch.no_grad()
    def forward(self, scores: Tensor) -> Tensor:
        check_features("scores", scores)
        wide = at_least_float32(scores.detach())
        return doubly_stochastic(wide, self.iterations, epsilon=self.epsilon, group=self.group)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, iterations={self.iterations}"


def assignment_cross_entropy(
    scores: Tensor,
    assignments: Tensor,
    *,
    temperature: float = 0.1,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross entropy of softmax(scores / τ) against assignments.

    .. math::
        \ell_b = -\sum_k Q_{bk} \log \mathrm{softmax}_k(S_b / \tau)

    DINOv2's loss of one pair of crops; its loss of masked tokens (iBOT) has
    ``weights`` 1 / (masked tokens of the image) and the sum over all, divided by the images.

    Args:
        scores: of the student, ``(..., K)``.
        assignments: ``(..., K)``, without a gradient.
        temperature: τ > 0.
        weights: ``(...)``, factors of the losses.
        reduction: ``"mean"`` over all (with weights, divided by their sum), ``"sum"`` or
            ``"none"``.

    Returns:
        ``()``, or ``(...)`` for none; float64 for float64, else float32. The mean of none is 0.

    Raises:
        ValueError: shapes, a temperature or a reduction out of range.
        TypeError: tensors that are not floating-point.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021;
    Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022; with the
    assignments of DINOv2.
    """
    check_features("scores", scores)
    check_features("assignments", assignments)
    if scores.shape != assignments.shape:
        raise ValueError(
            f"assignments must be {tuple(scores.shape)}, got {tuple(assignments.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if weights is not None and weights.shape != scores.shape[:-1]:
        raise ValueError(f"weights must be {tuple(scores.shape[:-1])}, got {tuple(weights.shape)}")
    with full_precision(scores):
        s = at_least_float32(scores) / temperature
        q = assignments.detach().to(s.dtype)
        losses = q.sum(-1) * s.logsumexp(-1) - (q * s).sum(-1)
        if weights is not None:
            losses = losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = losses.numel() if weights is None else weights.sum()
    return losses.sum() / count if losses.numel() else losses.sum()


class SwappedPredictionLoss(nn.Module):
    r"""SwAV: the assignment of one crop is predicted from the scores of each other crop.

    .. math::
        L = \frac{1}{|A|} \sum_{i \in A} \frac{1}{V - 1} \sum_{v \ne i}
            \frac1B \sum_b -\sum_k Q^i_{bk} \log \mathrm{softmax}_k(S^v_b / \tau)

    Args:
        epsilon, iterations, group: of the assignments, as in
            :class:`weft.nn.SinkhornAssignment`.
        temperature: τ > 0.
        crops_for_assign: A, the crops that are assigned: in SwAV the two large ones.

    Shapes: scores, a sequence of V >= 2 tensors ``(B, K)``: products of unit features with unit
    prototypes; ``queue``, of the scores ``(R, K)`` of earlier samples for each crop of A, which
    are assigned with the batch and then left out; loss ``()``.

    Raises:
        ValueError: arguments out of range, fewer than two crops, shapes.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments", NeurIPS 2020, with its multi-crop and its queue.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        epsilon: float = 0.05,
        iterations: int = 3,
        crops_for_assign: Sequence[int] = (0, 1),
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if not len(crops_for_assign):
            raise ValueError("crops_for_assign must name at least one crop")
        self.temperature, self.crops_for_assign = temperature, tuple(crops_for_assign)
        self.assign = SinkhornAssignment(epsilon, iterations, group=group)

    def forward(self, scores: Sequence[Tensor], queue: Sequence[Tensor] | None = None) -> Tensor:
        if len(scores) < 2 or max(self.crops_for_assign) >= len(scores):
            raise ValueError(
                f"scores must be of at least 2 crops, those of {self.crops_for_assign} among them, "
                f"got {len(scores)}"
            )
        if queue is not None and len(queue) != len(self.crops_for_assign):
            raise ValueError(
                f"queue must have scores for {len(self.crops_for_assign)} crops, got {len(queue)}"
            )
        losses = []
        for place, assigned in enumerate(self.crops_for_assign):
            own = scores[assigned]
            together = own if queue is None else torch.cat([queue[place].to(own.dtype), own])
            target = self.assign(together)[-len(own) :] if len(own) else self.assign(own)
            losses += [
                assignment_cross_entropy(other, target, temperature=self.temperature)
                for index, other in enumerate(scores)
                if index != assigned
            ]
        return torch.stack(losses).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, crops_for_assign={self.crops_for_assign}"


def koleo_loss(x: Tensor, *, eps: float = 1e-8) -> Tensor:
    r"""Spreads unit features: the entropy estimate of Kozachenko and Leonenko, negated.

    .. math::
        L = -\frac1N \sum_i \log(\lVert \hat x_i - \hat x_{n(i)} \rVert + \epsilon), \qquad
        n(i) = \arg\max_{j \ne i} \langle \hat x_i, \hat x_j \rangle

    The neighbours are found without the matrix of similarities. Of repeated features the gradient
    of their distance is 0.

    Args:
        x: ``(N, D)`` with N >= 2: of one crop, in DINOv2 the class tokens of the student.
        eps: > 0.

    Returns:
        ``()``, float64 for float64, else float32.

    Raises:
        ValueError: shapes, eps out of range.
        TypeError: x that is not floating-point.

    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019; Oquab
    et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024, section 4.
    """
    check_features("x", x)
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"x must be (N, D) with N >= 2, got {tuple(x.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    with full_precision(x):
        unit = F.normalize(at_least_float32(x), dim=1, eps=eps)
        fixed = unit.detach()
        index = nearest(fixed, fixed, metric="dot", mask=PairMask.distinct()).indices[:, 0]
        distance = torch.linalg.vector_norm(unit - unit[index], dim=1)
        return -(distance + eps).log().mean()
