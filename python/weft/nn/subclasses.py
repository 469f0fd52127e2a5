"""Head classes cut into subclasses of equal size, and a contrastive loss on both levels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, check_label_vector, full_precision
from weft.ops.pairwise.cross_entropy import contrastive_loss
from weft.ops.transport.doubly_stochastic import doubly_stochastic


@torch.no_grad()
def sinkhorn_clusters(
    x: Tensor, clusters: int, *, steps: int = 10, epsilon: float = 0.05, iterations: int = 10
) -> Tensor:
    r"""Spherical k-means whose clusters have equal sizes, up to one sample.

    .. math::
        Q = \text{Sinkhorn}(\hat x c^\top / \varepsilon), \qquad
        c_k \leftarrow \mathrm{unit}\Big(\sum_i Q_{ik} \hat x_i\Big)

    Samples then go to the cluster with room that they prefer, :math:`\log Q`, those that prefer it
    most before others. The first centre is the sample nearest to the mean direction, each further
    one the sample farthest from those before: no chance enters.

    Args:
        x: ``(N, D)``, N >= ``clusters``.
        clusters: K >= 1.
        steps: updates of the centres, >= 0.
        epsilon, iterations: of the balanced assignment, ``weft.doubly_stochastic``.

    Returns:
        ``(N,)`` int64: N mod K clusters have floor(N / K) + 1 samples, the others floor(N / K).

    Raises:
        ValueError: shapes, numbers out of range.
        TypeError: x that is not floating-point.

    Source: Hou et al., "Subclass-balancing Contrastive Learning for Long-tailed Recognition",
    ICCV 2023, with the assignment of Caron et al., 2020, in place of its greedy one.
    """
    check_features("x", x)
    if x.dim() != 2 or not 1 <= clusters <= len(x):
        raise ValueError(f"x must be (N, D) with N >= {clusters} >= 1, got {tuple(x.shape)}")
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    with full_precision(x):
        unit = F.normalize(at_least_float32(x), dim=1)
        centers = unit[_spread(unit, clusters)]
        for _ in range(steps):
            q = doubly_stochastic(unit @ centers.T, iterations, epsilon=epsilon)
            centers = F.normalize(q.T @ unit, dim=1)
        # of rows that sum to 1, log q orders what a sample prefers and who prefers a cluster most
        q = doubly_stochastic(unit @ centers.T, iterations, epsilon=epsilon)
        preference = q.clamp(min=torch.finfo(q.dtype).tiny).log()
    labels = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    _fill(labels, preference, len(x) // clusters)
    _fill(labels, preference, 1)
    return labels


def _spread(unit: Tensor, clusters: int) -> list[int]:
    """Samples far from each other."""
    chosen = [int((unit @ unit.mean(0)).argmax())]
    nearest = unit @ unit[chosen[0]]
    while len(chosen) < clusters:
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]])
    return chosen


def _fill(labels: Tensor, preference: Tensor, room: int) -> None:
    """Gives ``room`` more samples to each cluster, or as many as there are."""
    clusters = preference.shape[1]
    left = torch.full((clusters,), room, dtype=torch.int64, device=labels.device)
    while bool((left > 0).any()) and bool((waiting := (labels < 0).nonzero()[:, 0]).numel()):
        open_to = preference[waiting].masked_fill(left == 0, -torch.inf)
        value, cluster = open_to.max(1)
        order = value.argsort(descending=True, stable=True)
        order = order[cluster[order].argsort(stable=True)]
        cluster = cluster[order]
        count = torch.bincount(cluster, minlength=clusters)
        rank = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[cluster]
        taken = rank < left[cluster]
        labels[waiting[order[taken]]] = cluster[taken]
        left -= torch.bincount(cluster[taken], minlength=clusters)


class SubclassBalancingLoss(nn.Module):
    r"""SBCL: a sample is near those of its subclass, then near the other subclasses of its class.

    With M(i) the other samples of the subclass of i, P(i) those of its class, A(i) all others, and
    :math:`s_{ij} = \cos(x_i, x_j)`,

    .. math::
        L = -\frac1N \sum_i \frac{1}{|M(i)|} \sum_{p \in M(i)} \log
                \frac{e^{s_{ip} / \tau}}{\sum_{a \in A(i)} e^{s_{ia} / \tau}}
            - \frac{\beta}{N} \sum_i \frac{1}{|P(i) \setminus M(i)|}
                \sum_{p \in P(i) \setminus M(i)} \log
                \frac{e^{s_{ip} / \tau_2}}{\sum_{a \in A(i) \setminus M(i)} e^{s_{ia} / \tau_2}}

    A sample without positives has no part in a sum.

    Args:
        temperature: τ > 0.
        class_temperature: τ₂ > 0.
        beta: β >= 0.

    Shapes: features ``(N, D)``, all views; labels ``(N,)`` int64, of classes; subclasses ``(N,)``
    int64, no two classes sharing one (:func:`weft.nn.sinkhorn_clusters` of each head class);
    ``temperatures`` ``(N,)``, a τ₂ for each sample: the published code has one for each class;
    loss ``()``, float64 for float64, else float32.

    Raises:
        ValueError: arguments out of range, shapes.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Hou et al., "Subclass-balancing Contrastive Learning for Long-tailed Recognition",
    ICCV 2023, its bi-granularity contrastive loss. The published code also keeps the other view
    of a sample in the sums of the second term.
    """

    def __init__(
        self, temperature: float = 0.1, *, class_temperature: float = 0.2, beta: float = 0.25
    ):
        super().__init__()
        for name, value in (("temperature", temperature), ("class_temperature", class_temperature)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if not beta >= 0:
            raise ValueError(f"beta must be >= 0, got {beta}")
        self.temperature, self.class_temperature, self.beta = temperature, class_temperature, beta

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        subclasses: Tensor,
        temperatures: Tensor | None = None,
    ) -> Tensor:
        check_features("features", features)
        if features.dim() != 2 or not len(features):
            raise ValueError(f"features must be (N, D) with N >= 1, got {tuple(features.shape)}")
        check_label_vector("labels", labels, features)
        check_label_vector("subclasses", subclasses, features)
        N = len(features)
        if temperatures is None:
            temperatures = features.new_full((N,), self.class_temperature)
        if temperatures.shape != (N,):
            raise ValueError(f"temperatures must be ({N},), got {tuple(temperatures.shape)}")
        with full_precision(features):
            x = F.normalize(at_least_float32(features), dim=1)
            options = {"kind": "supcon", "reduction": "sum"}
            fine = contrastive_loss(x, labels=subclasses, temperature=self.temperature, **options)
            other = subclasses[:, None] != subclasses  # never of a sample and itself
            same_class = (labels[:, None] == labels) & other
            # a temperature of each row is a factor of its features
            rows = x / temperatures.to(x.dtype)[:, None]
            coarse = contrastive_loss(
                rows, x, positives=same_class, mask=other, temperature=1.0, **options
            )
        return (fine + self.beta * coarse) / N

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, class_temperature={self.class_temperature}, "
            f"beta={self.beta}"
        )
