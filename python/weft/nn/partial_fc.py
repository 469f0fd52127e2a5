"""A cosine head over very many classes, of which each step sees a sample."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import check_features, check_labels, check_sizes


class PartialFC(nn.Module):
    r"""Cosine logits over the classes of the batch and a random sample of the others.

    .. math::
        \text{logit}_j = s \, (\cos(x, w_{c_j}) - m \, [c_j = y]), \qquad
        c = \text{classes of the batch} \cup \text{sample}

    Logits, their gradient and the product cost a share of what all classes would; the classes that
    a sample leaves out are not pushed away in this step, which also spares classes that are
    another one in disguise. The head returns what a cross entropy takes:
    ``F.cross_entropy(*head(x, labels))``.

    Args:
        in_features: D.
        num_classes: C.
        sample_rate: share of the classes in a step, above 0, at most 1. A step has
            ``max(round(rate * C), B)`` of them (at most C), which has room for all of the batch
            and does not depend on the labels: no host sync, no new shape.
        scale: s, > 0.
        margin: m, >= 0.
        sparse: give the weight a sparse gradient, which holds the rows of the sample alone
            (``torch.optim.SGD`` and ``SparseAdam`` take it).
        device, dtype: of the weight.

    Attributes:
        weight: ``(C, D)``, of any length: only directions count.

    Shapes: features ``(B, D)`` and labels ``(B,)`` int64 give logits ``(B, S)`` and targets
    ``(B,)``, columns in the order of their classes; without labels all logits ``(B, C)``, with no
    margin.

    Raises:
        ValueError: sizes, a rate, scale or margin out of range, labels outside the classes.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
    Recognition CNNs by Partial FC", CVPR 2022, section 3.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        sample_rate: float = 0.1,
        scale: float = 64.0,
        margin: float = 0.4,
        sparse: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes)
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be above 0 and at most 1, got {sample_rate}")
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        if not margin >= 0:
            raise ValueError(f"margin must be >= 0, got {margin}")
        self.in_features, self.out_features = in_features, num_classes
        self.sample_rate, self.sparse = float(sample_rate), sparse
        self.scale, self.margin = float(scale), float(margin)
        shape = (num_classes, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gaussian rows of length about 1: random directions."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def sample(self, labels: Tensor) -> Tensor:
        """The classes of a step, in rising order: those of ``labels`` and random ones."""
        C = self.out_features
        size = min(C, max(round(self.sample_rate * C), len(labels)))
        priority = torch.rand(C, device=labels.device)
        priority[labels] = 2.0  # before all others, whose priorities are below 1
        return priority.topk(size).indices.sort().values

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        check_features("x", x, self.in_features)
        x = F.normalize(x, dim=-1)
        if labels is None:
            return self.scale * F.linear(x, F.normalize(self.weight, dim=-1))
        if x.dim() != 2:
            raise ValueError(f"x must be (B, {self.in_features}), got {tuple(x.shape)}")
        check_labels("labels", labels, x.shape[:1], self.out_features)
        classes = self.sample(labels)
        rows = F.embedding(classes, self.weight, sparse=self.sparse)
        targets = torch.searchsorted(classes, labels)
        cosine = F.linear(x, F.normalize(rows, dim=-1))
        own = self.margin * F.one_hot(targets, len(classes)).to(cosine.dtype)
        return self.scale * (cosine - own), targets

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"sample_rate={self.sample_rate}, scale={self.scale}, margin={self.margin}"
        )
