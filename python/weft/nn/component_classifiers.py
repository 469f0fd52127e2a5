"""Classification by components: prototypes are found in a sample, or are found to be missing."""

import math

import torch
from torch import Tensor, nn

from weft.nn.checks import (
    at_least_float32,
    check_features,
    check_labels,
    check_sizes,
    full_precision,
)
from weft.nn.prototype_classifiers import squared_distances


class RBFClassifier(nn.Module):
    r"""Probabilities of classes from radial basis functions that speak for and against them.

    .. math::
        d_k(x) = e^{-\lVert x - p_k \rVert^2 / \sigma_k}
            \;\; \text{or} \;\; e^{-\lVert x - p_k \rVert / \sigma_k}, \qquad
        \Pr(c \mid x) = \sum_k d_k(x) \, r^+_{kc} + (1 - d_k(x)) \, r^-_{kc}, \qquad
        \sum_k r^+_{kc} + r^-_{kc} = 1

    A component k is detected with probability :math:`d_k`. For class c its presence counts with the
    weight :math:`r^+_{kc}` and its absence with :math:`r^-_{kc}`; the weights are probabilities, a
    softmax over all components and both kinds, so each logit can be read as an explanation.
    With one product: :math:`d (r^+ - r^-) + \sum_k r^-_k`.

    Args:
        in_features: D.
        num_classes: C.
        num_prototypes: K.
        width: sigma of the beginning, > 0, in the units of the distance (squared or not).
        squared: the Gaussian of the squared distance, or the exponential of the distance itself.
        device, dtype: of the parameters.

    Attributes:
        prototypes: ``(K, D)``.
        log_width: ``(K,)``: sigma is learned as its logarithm.
        reasoning: ``(2, K, C)``, the logits of :math:`r^+` and :math:`r^-`.

    Shapes: features ``(..., D)``, probabilities ``(..., C)`` in [0, 1]; they do not sum to 1 over
    the classes. Train with :func:`probability_margin_loss`; :meth:`certified_radius` says how far
    a sample can move without a change of its class.

    Raises:
        ValueError: sizes, a width that is not positive, features of another size.
        TypeError: features that are not floating-point.

    Source: Saralajew et al., "A Robust Prototype-Based Network with Interpretable RBF Classifier
    Foundations", AAAI 2025; Saralajew et al., "Classification-by-Components: Probabilistic Modeling
    of Reasoning over a Set of Components", NeurIPS 2019.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_prototypes: int,
        *,
        width: float = 1.0,
        squared: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes, num_prototypes=num_prototypes)
        if not width > 0:
            raise ValueError(f"width must be > 0, got {width}")
        self.in_features, self.out_features = in_features, num_classes
        self.width, self.squared = float(width), squared
        options = {"device": device, "dtype": dtype}
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, in_features, **options))
        self.log_width = nn.Parameter(torch.empty(num_prototypes, **options))
        self.reasoning = nn.Parameter(torch.empty(2, num_prototypes, num_classes, **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gaussian prototypes and reasoning logits, widths as given."""
        self.prototypes.normal_()
        self.log_width.fill_(math.log(self.width))
        self.reasoning.normal_(0.6, 0.2)

    def reasoning_probabilities(self) -> Tensor:
        """``(2, K, C)``: the weights of presence and of absence, 1 in all for each class."""
        logits = at_least_float32(self.reasoning)
        return logits.flatten(0, 1).softmax(0).view_as(logits)

    def detection(self, x: Tensor) -> Tensor:
        """``(..., K)``: the probability that each component is there."""
        return torch.exp(-self._distances(x) / self._width())

    def _width(self) -> Tensor:
        return at_least_float32(self.log_width).exp()

    def _distances(self, x: Tensor) -> Tensor:
        check_features("x", x, self.in_features)
        squared = squared_distances(x, self.prototypes)
        return squared if self.squared else safe_sqrt(squared)

    def forward(self, x: Tensor) -> Tensor:
        present, absent = self.reasoning_probabilities()
        detected = self.detection(x)
        return (detected @ (present - absent) + absent.sum(0)).to(x.dtype)

    def log_stretch(self, x: Tensor, labels: Tensor) -> Tensor:
        r"""How far all detection probabilities may be off, as a logarithm, before the class flips.

        If each :math:`d_k` is known up to a factor from 1/t to t, the lead of class y over c is

        .. math::
            \Pr(y \mid x) - \Pr(c \mid x) \ge A/t - B t + \Delta, \quad
            A = \sum_k d_k (r^+_{ky} + r^-_{kc}), \;
            B = \sum_k d_k (r^-_{ky} + r^+_{kc}), \; \Delta = \sum_k r^-_{ky} - r^-_{kc}

        which is 0 at :math:`t = (\Delta + \sqrt{\Delta^2 + 4AB}) / 2B`.

        Args:
            x: ``(B, D)``.
            labels: ``(B,)`` int64.

        Returns:
            ``(B,)``: log t, the least over the classes c; negative for a sample that is not
            classified as y. ``(margin - log_stretch).clamp(min=0)`` is the loss that makes
            the prediction robust.
        """
        check_features("x", x, self.in_features)
        if x.dim() != 2:
            raise ValueError(f"x must be (B, {self.in_features}), got {tuple(x.shape)}")
        check_labels("labels", labels, x.shape[:1], self.out_features)
        detected = self.detection(x)
        with full_precision(x):
            present, absent = self.reasoning_probabilities()
            speaks_for, speaks_against = detected @ present, detected @ absent
            own = labels[:, None]
            # far from all components both would underflow to a quotient of zeros
            smallest = torch.finfo(detected.dtype).tiny ** 0.5
            A = (speaks_for.gather(1, own) + speaks_against).clamp(min=smallest)
            B = (speaks_against.gather(1, own) + speaks_for).clamp(min=smallest)
            floor = absent.sum(0)
            delta = floor[labels][:, None] - floor
            root = (delta.square() + 4 * A * B).sqrt()
            # the larger of the two equal forms of t, of which one cancels where delta < 0
            t = torch.where(delta > 0, (delta + root) / (2 * B), 2 * A / (root - delta))
            return t.log().scatter(1, own, float("inf")).amin(1)

    @torch.no_grad()
    def certified_radius(self, x: Tensor, labels: Tensor) -> Tensor:
        r"""Euclidean distance that x can move in any direction and stay classified as y.

        A move by :math:`\epsilon` changes :math:`\log d_k` by at most :math:`\epsilon/\sigma_k`, or
        for the squared distance by :math:`(2 \lVert x - p_k \rVert \epsilon + \epsilon^2) /
        \sigma_k`; the radius is where that reaches :meth:`log_stretch` for the first k.

        Args:
            x: ``(B, D)``.
            labels: ``(B,)`` int64.

        Returns:
            ``(B,)``, >= 0; 0 for a sample that is not classified as y.
        """
        budget = self.log_stretch(x, labels).clamp(min=0)[:, None] * self._width()
        if self.squared:
            squared = self._distances(x)
            # sqrt(r^2 + b) - r without its cancellation
            budget = budget / ((squared + budget).sqrt() + squared.sqrt()).clamp(min=1e-30)
        return budget.amin(1).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_prototypes={len(self.prototypes)}, width={self.width}, "
            f"squared={self.squared}"
        )


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def probability_margin_loss(probabilities: Tensor, labels: Tensor, margin: float = 0.3) -> Tensor:
    r"""How far the right class is from leading by a margin.

    .. math::
        L = \frac1B \sum_b \max(0, \, \max_{c \ne y_b} \Pr(c \mid x_b) - \Pr(y_b \mid x_b) + m)

    Args:
        probabilities: ``(B, C)``, C >= 2, in [0, 1].
        labels: ``(B,)`` int64.
        margin: m, from 0 to 1.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: shapes, labels outside the classes, a margin out of range.
        TypeError: probabilities that are not floating-point, labels that are not int64.

    Source: Saralajew et al., "A Robust Prototype-Based Network with Interpretable RBF Classifier
    Foundations", AAAI 2025.
    """
    check_features("probabilities", probabilities)
    if probabilities.dim() != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities must be (B, C) with C >= 2, got {tuple(probabilities.shape)}"
        )
    check_labels("labels", labels, probabilities.shape[:1], probabilities.shape[1])
    if not 0 <= margin <= 1:
        raise ValueError(f"margin must be from 0 to 1, got {margin}")
    if not len(probabilities):
        return probabilities.sum()
    own = probabilities.gather(1, labels[:, None])
    others = probabilities.scatter(1, labels[:, None], float("-inf"))
    return (others.amax(1, keepdim=True) - own + margin).clamp(min=0).mean()
