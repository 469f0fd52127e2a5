"""Classification by components: prototypes are found in a sample, or are found to be missing."""

import math

import torch
from torch import Tensor, nn

from weft.nn.checks import at_least_float32, check_features, check_labels, check_sizes
from weft.nn.prototype_classifiers import squared_distances


class RBFClassifier(nn.Module):
    r"""Probabilities of classes from radial basis functions that speak for and against them.

    .. math::
        d_k(x) = e^{-\lVert x - p_k \rVert^2 / \sigma_k}, \qquad
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
        width: sigma of the beginning, > 0, in the units of squared distance.
        device, dtype: of the parameters.

    Attributes:
        prototypes: ``(K, D)``.
        log_width: ``(K,)``: sigma is learned as its logarithm.
        reasoning: ``(2, K, C)``, the logits of :math:`r^+` and :math:`r^-`.

    Shapes: features ``(..., D)``, probabilities ``(..., C)`` in [0, 1]; they do not sum to 1 over
    the classes. Train with :func:`probability_margin_loss`.

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
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes, num_prototypes=num_prototypes)
        if not width > 0:
            raise ValueError(f"width must be > 0, got {width}")
        self.in_features, self.out_features, self.width = in_features, num_classes, float(width)
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
        check_features("x", x, self.in_features)
        squared = squared_distances(x, self.prototypes)
        return torch.exp(-squared / at_least_float32(self.log_width).exp())

    def forward(self, x: Tensor) -> Tensor:
        present, absent = self.reasoning_probabilities()
        detected = self.detection(x)
        return (detected @ (present - absent) + absent.sum(0)).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_prototypes={len(self.prototypes)}, width={self.width}"
        )


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
