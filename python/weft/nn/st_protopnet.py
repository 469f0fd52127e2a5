"""Support and trivial prototypes: two heads, one near the border of classes, one far from it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import check_sizes, full_precision
from weft.nn.protopnet import (
    Projection,
    PrototypeSearch,
    extremes,
    foreign_weights,
    own_prototypes,
    set_connections,
)
from weft.ops.pairwise.segment_max import prototype_similarity


class CosinePrototypes(nn.Module):
    r"""One of the two heads: logits from the largest cosine of a feature map to each prototype.

    .. math::
        \text{sim}_{bp} = \max_{hw} [\cos(f_{b,:,hw}, p_p)]_+, \qquad
        \text{logits} = \text{sim} \, W^\top

    Attributes:
        prototypes: ``(P, D)``, P = C m, unit vectors at the beginning.
        classes: ``(P,)`` int64.
        last_layer: W, ``torch.nn.Linear`` without a bias, 1 and ``incorrect`` at the beginning.
    """

    def __init__(self, in_channels, num_classes, prototypes_per_class, incorrect, device, dtype):
        super().__init__()
        P = num_classes * prototypes_per_class
        self.num_classes, self.incorrect = num_classes, float(incorrect)
        self.prototypes = nn.Parameter(torch.empty(P, in_channels, device=device, dtype=dtype))
        self.register_buffer("classes", torch.arange(P, device=device) // prototypes_per_class)
        self.last_layer = nn.Linear(P, num_classes, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prototypes)
        self.normalize_()
        set_connections(self.last_layer.weight, self.classes, self.incorrect)

    @torch.no_grad()
    def normalize_(self) -> None:
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))

    def cosines(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The largest cosine of each sample to each prototype and its place, both ``(B, P)``."""
        with full_precision(features):
            unit, prototypes = F.normalize(features, dim=1), F.normalize(self.prototypes, dim=1)
            best, positions = prototype_similarity(unit, prototypes, "linear")
        return 1 + best / 2, positions  # ‖u − v‖² = 2 − 2 cos of unit vectors

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        similarities = self.cosines(features)[0].relu()
        return self.last_layer(similarities), similarities


class STProtoPNetOutput(NamedTuple):
    """``logits`` ``(B, C)``, the sum of the two heads'; each head's own, and its similarities
    ``(B, P)``."""

    logits: Tensor
    trivial_logits: Tensor
    support_logits: Tensor
    trivial_similarities: Tensor
    support_similarities: Tensor


class STProtoPNetHead(nn.Module):
    r"""Two sets of part prototypes, and the sum of their logits.

    Trivial prototypes lie far from the border of the classes, support prototypes near it, as
    support vectors do: :class:`STProtoPNetLoss` pulls them there. Both compare by the cosine.

    .. math::
        \text{sim}_{bp} = \max_{hw} [\cos(f_{b,:,hw}, p_p)]_+, \qquad
        \text{logits} = \text{sim}^{tr} W_{tr}^\top + \text{sim}^{sp} W_{sp}^\top

    Args:
        in_channels: D.
        num_classes: C.
        prototypes_per_class: m, of each head; P = C m.
        incorrect: the weight that joins a class to prototypes of others at the beginning.
        device, dtype: of the parameters.

    Attributes:
        trivial, support: the two heads, each with ``prototypes`` ``(P, D)``, ``classes`` ``(P,)``
            and ``last_layer``.

    Shapes: features ``(B, D, H, W)``, one map for each head (the paper has a pair of 1 x 1
    convolutions for each) or the same for both; the result is an :class:`STProtoPNetOutput`.

    Raises:
        ValueError: sizes, features of another size.
        TypeError: features of another dtype than the prototypes.

    Source: Wang et al., "Learning Support and Trivial Prototypes for Interpretable Image
    Classification", ICCV 2023, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        prototypes_per_class: int = 5,
        *,
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
        sizes = (in_channels, num_classes, prototypes_per_class)
        self.trivial = CosinePrototypes(*sizes, incorrect, device, dtype)
        self.support = CosinePrototypes(*sizes, incorrect, device, dtype)

    def forward(
        self, trivial_features: Tensor, support_features: Tensor | None = None
    ) -> STProtoPNetOutput:
        support_features = trivial_features if support_features is None else support_features
        trivial, trivial_similarities = self.trivial(trivial_features)
        support, support_similarities = self.support(support_features)
        similarities = (trivial_similarities, support_similarities)
        return STProtoPNetOutput(trivial + support, trivial, support, *similarities)

    def normalize_(self) -> None:
        """Divides the prototypes by their norms; the paper does so after every step."""
        self.trivial.normalize_()
        self.support.normalize_()

    @torch.no_grad()
    def push(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Projection]:
        """Moves each prototype onto the nearest direction of a sample of its class.

        Args:
            batches: trivial features, support features, labels, as for the forward.

        Returns:
            Where the prototypes of ``"trivial"`` and ``"support"`` were found.
        """
        heads = {"trivial": self.trivial, "support": self.support}
        searches = {
            name: PrototypeSearch(head.prototypes, head.classes, head.num_classes)
            for name, head in heads.items()
        }
        for *maps, labels in batches:
            for (name, head), features in zip(heads.items(), maps, strict=True):
                unit = F.normalize(features, dim=1)
                searches[name].update(unit, labels, *head.cosines(unit))
        return {name: search.move() for name, search in searches.items()}


class STProtoPNetTerms(NamedTuple):
    """Two losses, ``()`` each: the paper trains them in turns, one batch each."""

    trivial: Tensor
    support: Tensor


class STProtoPNetLoss(nn.Module):
    r"""What :class:`STProtoPNetHead` is trained with: one loss for each head.

    .. math::
        L = \mathrm{CE} - \lambda_c \frac1B \sum_b \max_{p \in P_{y_b}} \text{sim}_{bp}
            + \lambda_s \frac1B \sum_b \max_{p \notin P_{y_b}} \text{sim}_{bp}
            + \lambda_o \sum_c \lVert P_c P_c^\top - I \rVert_1
            + \lambda_1 \sum_{p \notin P_c} |W_{cp}| + \text{apart or close}

    .. math::
        \text{apart (trivial)} = \frac{\lambda_d}{C(C-1)} \sum_{c \ne c'}
            \max_{p \in P_c, p' \in P_{c'}} \langle p, p' \rangle, \qquad
        \text{close (support)} = -\frac{\lambda_d}{C(C-1)} \sum_{c \ne c'}
            \min_{p \in P_c, p' \in P_{c'}} \langle p, p' \rangle

    so that trivial prototypes of different classes part and support prototypes approach. The norm
    of the orthonormality term is the sum over the entries, as in the published code.

    Args:
        cluster: :math:`\lambda_c`.
        trivial_separation, support_separation: :math:`\lambda_s` of each head.
        orthonormality: :math:`\lambda_o`.
        between_classes: :math:`\lambda_d`.
        l1: :math:`\lambda_1`. The defaults are those of the published code.

    Shapes: the output of the head, labels ``(B,)`` int64 with B >= 1, the head; a named tuple of
    two scalars.

    Raises:
        ValueError: labels outside the classes, an empty batch.
        TypeError: labels that are not int64.

    Source: Wang et al., "Learning Support and Trivial Prototypes for Interpretable Image
    Classification", ICCV 2023, section 3: the closeness, discrimination and orthonormality losses
    and the objectives of the two branches.
    """

    def __init__(
        self,
        cluster: float = 0.8,
        trivial_separation: float = 0.08,
        support_separation: float = 0.48,
        orthonormality: float = 1e-3,
        between_classes: float = 1.0,
        l1: float = 1e-4,
    ):
        super().__init__()
        self.cluster, self.orthonormality = cluster, orthonormality
        self.trivial_separation, self.support_separation = trivial_separation, support_separation
        self.between_classes, self.l1 = between_classes, l1

    def forward(
        self, output: STProtoPNetOutput, labels: Tensor, head: STProtoPNetHead
    ) -> STProtoPNetTerms:
        own = own_prototypes(output.logits, labels, head.trivial.classes)
        losses = []
        for name, separation in (
            ("trivial", self.trivial_separation),
            ("support", self.support_separation),
        ):
            part = getattr(head, name)
            gram, orthonormality = self._grams(part)
            between = (gram if name == "trivial" else -gram).max(-1).values
            C = part.num_classes
            between = between.masked_fill(torch.eye(C, device=own.device, dtype=torch.bool), 0)
            between = between.sum() / max(C * (C - 1), 1)
            near, far = extremes(getattr(output, f"{name}_similarities"), own)
            losses.append(
                F.cross_entropy(getattr(output, f"{name}_logits"), labels)
                - self.cluster * near
                + separation * far
                + self.orthonormality * orthonormality
                + self.between_classes * between
                + self.l1 * foreign_weights(part.last_layer.weight, part.classes)
            )
        return STProtoPNetTerms(*losses)

    @staticmethod
    def _grams(part: CosinePrototypes) -> tuple[Tensor, Tensor]:
        """Products of the prototypes of two classes, ``(C, C, m m)``, and how far from orthonormal
        those of one class are."""
        with full_precision(part.prototypes):
            rows = part.prototypes.view(part.num_classes, -1, part.prototypes.shape[1])
            C, m, _ = rows.shape
            gram = (part.prototypes @ part.prototypes.mT).view(C, m, C, m)
            gram = gram.transpose(1, 2).flatten(2)
            identity = torch.eye(m, dtype=rows.dtype, device=rows.device)
            return gram, (rows @ rows.mT - identity).abs().sum()
