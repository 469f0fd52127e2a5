"""Part prototypes: "this looks like that" classifiers over feature maps."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import check_labels, check_sizes, full_precision
from weft.ops.pairwise.segment_max import prototype_similarity


class ProtoPNetOutput(NamedTuple):
    """``logits`` ``(B, C)``; of each sample and prototype, both ``(B, P)``: ``distances``, squared,
    of the nearest place, and ``positions``, that place as ``h * W + w``."""

    logits: Tensor
    distances: Tensor
    positions: Tensor


class Projection(NamedTuple):
    """Where each prototype was found, ``(P,)`` int64 each and -1 if nowhere: the number of the
    ``sample`` in the order of the batches, its place ``h * W + w``; and the squared distance that
    the prototype moved, ``(P,)``."""

    sample: Tensor
    position: Tensor
    distance: Tensor


class ProtoPNetHead(nn.Module):
    r"""Classifies a feature map by how much its most similar places look like learned prototypes.

    .. math::
        d_{bp} = \min_{hw} \lVert f_{b,:,hw} - p_p \rVert^2, \qquad
        \text{sim}_{bp} = \log \frac{d_{bp} + 1}{d_{bp} + \epsilon}, \qquad
        \text{logits} = \text{sim} \, W^\top

    Each class has as many prototypes as every other. W begins at 1 for a class and its own
    prototypes and at ``incorrect`` elsewhere. Train with :class:`ProtoPNetLoss`; :meth:`push` moves
    every prototype onto the nearest place of a training sample of its class, which can then be
    shown as what the prototype looks like.

    Args:
        in_channels: D.
        num_classes: C.
        prototypes_per_class: m; P = C m.
        activation: log, or linear for sim = -d.
        eps: epsilon of log, > 0.
        incorrect: the weight that joins a class to prototypes of others at the beginning.
        device, dtype: of the parameters.

    Attributes:
        prototypes: ``(P, D)``, uniform in [0, 1) at the beginning: made for features that a sigmoid
            ends, as in the paper.
        classes: ``(P,)`` int64, the class of each prototype.
        last_layer: W, ``torch.nn.Linear`` without a bias.

    Shapes: features ``(B, D, H, W)``; the result is a :class:`ProtoPNetOutput`.

    Raises:
        ValueError: sizes, an unknown activation, features of another size.
        TypeError: features of another dtype than the prototypes.

    Source: Chen et al., "This Looks Like That: Deep Learning for Interpretable Image Recognition",
    NeurIPS 2019, sections 2.1 and 2.2.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        prototypes_per_class: int = 10,
        *,
        activation: str = "log",
        eps: float = 1e-4,
        incorrect: float = -0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(
            in_channels=in_channels,
            num_classes=num_classes,
            prototypes_per_class=prototypes_per_class,
        )
        if activation not in ("log", "linear"):
            raise ValueError(f"activation must be log or linear, got {activation!r}")
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        P = num_classes * prototypes_per_class
        self.in_channels, self.num_classes = in_channels, num_classes
        self.activation, self.eps, self.incorrect = activation, float(eps), float(incorrect)
        self.prototypes = nn.Parameter(torch.empty(P, in_channels, device=device, dtype=dtype))
        self.register_buffer("classes", torch.arange(P, device=device) // prototypes_per_class)
        self.last_layer = nn.Linear(P, num_classes, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prototypes)
        set_connections(self.last_layer.weight, self.classes, self.incorrect)

    def forward(self, features: Tensor) -> ProtoPNetOutput:
        with full_precision(features):
            # The linear activation is -d; both activations fall with d, so its maximum is theirs.
            best, positions = prototype_similarity(features, self.prototypes, "linear")
        distances = -best
        similarities = best
        if self.activation == "log":
            similarities = ((distances + 1) / (distances + self.eps)).log()
        return ProtoPNetOutput(self.last_layer(similarities), distances, positions)

    @torch.no_grad()
    def push(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Projection:
        """Replaces each prototype by the nearest place of the samples of its class.

        Args:
            batches: pairs of features ``(B, D, H, W)``, as for the forward, and labels ``(B,)``
                int64: ``((backbone(x), y) for x, y in loader)``.

        Returns:
            Where each was found. Of equal distances the first counts. A prototype of a class
            without samples stays.
        """
        search = PrototypeSearch(self.prototypes, self.classes, self.num_classes)
        for features, labels in batches:
            search.update(
                features, labels, *prototype_similarity(features, self.prototypes, "linear")
            )
        return search.move()

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, num_classes={self.num_classes}, "
            f"num_prototypes={len(self.prototypes)}, activation={self.activation!r}"
        )


class ProtoPNetTerms(NamedTuple):
    """``loss`` is the weighted sum of the others, each ``()``."""

    loss: Tensor
    cross_entropy: Tensor
    cluster: Tensor
    separation: Tensor
    l1: Tensor


class ProtoPNetLoss(nn.Module):
    r"""What :class:`ProtoPNetHead` is trained with.

    .. math::
        L = \mathrm{CE} + \lambda_c \frac1B \sum_b \min_{p \in P_{y_b}} d_{bp}
            + \lambda_s \frac1B \sum_b \min_{p \notin P_{y_b}} d_{bp}
            + \lambda_1 \sum_{p \notin P_c} |W_{cp}|

    Some place of an image is to be near a prototype of its class (cluster), all places far from
    those of other classes (separation, of negative weight), and no class is to argue by what an
    image lacks (l1). With one class the separation is 0.

    Args:
        cluster, separation, l1: the weights; the defaults are those of the paper's experiments.

    Shapes: the output of the head, labels ``(B,)`` int64 with B >= 1, the head; a named tuple of
    five scalars.

    Raises:
        ValueError: labels outside the classes, an empty batch.
        TypeError: labels that are not int64.

    Source: Chen et al., "This Looks Like That: Deep Learning for Interpretable Image Recognition",
    NeurIPS 2019, section 2.2, equations for the cluster and separation costs and the convex
    optimization of the last layer.
    """

    def __init__(self, cluster: float = 0.8, separation: float = -0.08, l1: float = 1e-4):
        super().__init__()
        self.cluster, self.separation, self.l1 = cluster, separation, l1

    def forward(
        self, output: ProtoPNetOutput, labels: Tensor, head: ProtoPNetHead
    ) -> ProtoPNetTerms:
        own = own_prototypes(output.logits, labels, head.classes)
        cluster, separation = extremes(-output.distances, own)
        cross_entropy = F.cross_entropy(output.logits, labels)
        l1 = foreign_weights(head.last_layer.weight, head.classes)
        loss = cross_entropy - self.cluster * cluster - self.separation * separation + self.l1 * l1
        return ProtoPNetTerms(loss, cross_entropy, -cluster, -separation, l1)

    def extra_repr(self) -> str:
        return f"cluster={self.cluster}, separation={self.separation}, l1={self.l1}"


def set_connections(weight: Tensor, classes: Tensor, incorrect: float) -> None:
    """1 between a class and its prototypes, ``incorrect`` elsewhere."""
    own = torch.arange(len(weight), device=weight.device)[:, None] == classes
    weight.copy_(own + incorrect * ~own)


def own_prototypes(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """``(B, P)`` bool: the prototypes of each sample's class."""
    B, C = logits.shape
    if not B:
        raise ValueError("output must have at least one sample")
    check_labels("labels", labels, (B,), C)
    return labels[:, None] == classes


def extremes(similarities: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the samples of the largest similarity to an own and to a foreign prototype."""
    largest = similarities.masked_fill(~own, -torch.inf).max(1).values.mean()
    if own.all():
        return largest, largest * 0
    return largest, similarities.masked_fill(own, -torch.inf).max(1).values.mean()


def foreign_weights(weight: Tensor, classes: Tensor) -> Tensor:
    """The sum of the sizes of the weights between classes and the prototypes of others."""
    own = torch.arange(len(weight), device=weight.device)[:, None] == classes
    return weight.masked_fill(own, 0).abs().sum()


class PrototypeSearch:
    """The nearest place to each prototype in the samples of its class, batch after batch."""

    def __init__(self, prototypes: Tensor, classes: Tensor, num_classes: int):
        self.prototypes, self.classes, self.num_classes = prototypes, classes, num_classes
        self.best = torch.full_like(prototypes[:, 0], -torch.inf)
        self.sample = torch.full_like(classes, -1)
        self.position = torch.full_like(classes, -1)
        self.patches, self.seen = prototypes.clone(), 0

    def update(self, features: Tensor, labels: Tensor, best: Tensor, positions: Tensor) -> None:
        """``best`` similarities of the samples to the prototypes and their places, ``(B, P)``."""
        check_labels("labels", labels, (len(features),), self.num_classes)
        if features.numel():
            values = best.masked_fill(labels[:, None] != self.classes, -torch.inf)
            values, rows = values.max(0)
            better = values > self.best
            place = positions.gather(0, rows[None])[0]
            patches = features.flatten(2)[rows, :, place].to(self.patches.dtype)
            self.best = torch.where(better, values, self.best)
            self.sample = torch.where(better, rows + self.seen, self.sample)
            self.position = torch.where(better, place, self.position)
            self.patches = torch.where(better[:, None], patches, self.patches)
        self.seen += len(features)

    def move(self) -> Projection:
        moved = (self.patches - self.prototypes).square().sum(1)
        self.prototypes.copy_(self.patches)
        return Projection(self.sample, self.position, moved)
