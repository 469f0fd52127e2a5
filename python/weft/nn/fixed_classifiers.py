"""Classifiers whose weights are not learned: the vertices of a regular simplex."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, check_sizes


class SimplexClassifier(nn.Module):
    r"""Logits against the d+1 vertices of a regular simplex in d dimensions, without a weight.

    The vertices :math:`e_1, \dots, e_d` and :math:`\alpha \mathbf 1`,
    :math:`\alpha = (1 - \sqrt{d+1})/d`, are as far from each other; centred by their mean
    :math:`\mu \mathbf 1`, :math:`\mu = (1 + \alpha)/(d + 1)`, and divided by their norm
    :math:`\rho = \sqrt{d/(d+1)}` they are the rows :math:`w_c` of the classifier, with
    :math:`\langle w_i, w_j \rangle = -1/d`. A logit then needs the sum of the features and three
    scalars, O(d) for a sample instead of a product with a (d+1) x d matrix:

    .. math::
        \text{logit}_c = \langle w_c, h \rangle
            = \frac{h_c - \mu \sum_i h_i}{\rho} \;\; (c < d), \qquad
        \text{logit}_d = \frac{(\alpha - \mu) \sum_i h_i}{\rho}

    Features learned against it keep their place as classes are added: give the number of classes
    that there may ever be. Those of the future take part in the cross entropy as all others do,
    which keeps their directions free, and are cut off for a prediction:
    ``logits[..., :seen].argmax(-1)``.

    Args:
        num_classes: C, at least 2, with those set aside for the future; features have C - 1
            dimensions.

    Shapes: features ``(..., C - 1)``, logits ``(..., C)``, contiguous, of the dtype of the
    features; half precision is computed in float32. There is no parameter and no state.

    Raises:
        ValueError: fewer than two classes, features of another size.
        TypeError: features that are not floating-point.

    Source: Biondi et al., "CoReS: Compatible Representations via Stationarity", TPAMI 2023,
    the d-Simplex fixed classifier; Biondi et al., "Stationary Representations: Optimally
    Approximating Compatibility and Implications for Improved Model Replacements", CVPR 2024.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be an integer >= 2, got {num_classes!r}")
        self.in_features, self.out_features = num_classes - 1, num_classes

    @property
    def weight(self) -> Tensor:
        """The vertices themselves, ``(C, C - 1)`` in float64: directions to look features up by."""
        return simplex_logits(torch.eye(self.in_features, dtype=torch.float64)).mT.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x, self.in_features)
        return simplex_logits(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def simplex_logits(x: Tensor) -> Tensor:
    """The formula of :class:`SimplexClassifier`: ``(..., d) -> (..., d + 1)``."""
    d = x.shape[-1]
    # alpha = (1 - sqrt(d + 1)) / d without its cancellation at small d
    alpha = -1 / (1 + math.sqrt(d + 1))
    mean = (1 + alpha) / (d + 1)
    scale = math.sqrt((d + 1) / d)
    wide = at_least_float32(x)
    total = wide.sum(-1, keepdim=True)
    logits = torch.cat([wide - mean * total, (alpha - mean) * total], -1) * scale
    return logits.to(x.dtype)


class ETFClassifier(nn.Module):
    r"""Logits against a fixed simplex equiangular tight frame in any number of dimensions >= C - 1.

    .. math::
        \text{logit} = s \, W x, \qquad W W^\top = \frac{C}{C-1} I - \frac{1}{C-1} \mathbf 1
        \mathbf 1^\top

    The rows of W have norm 1 and the widest angle that C directions can have with each other, the
    geometry to which a trained classifier's last layer collapses. W is the simplex of
    :class:`SimplexClassifier`, turned by a random rotation of the D-dimensional space.

    Args:
        in_features: D, at least C - 1.
        num_classes: C, at least 2.
        scale: s, > 0.
        normalize: divide the features by their norm: logits are then s times a cosine.
        rotation: ``"random"``: uniform over all orientations; W is kept in ``state_dict`` and
            costs a matrix product. ``None``: the simplex fills the first C - 1 coordinates and the
            others are not used; there is no state, and logits are O(C) for a sample.
        device, dtype: of the weight.

    Attributes:
        weight: buffer ``(C, D)``; None without a rotation.

    Shapes: features ``(..., D)``, logits ``(..., C)``.

    Raises:
        ValueError: sizes that do not fit, a scale or rotation that is none.
        TypeError: features that are not floating-point.

    Source: Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep
    learning training", PNAS 2020; Yang et al., "Inducing Neural Collapse in
    Imbalanced Learning: Do We Really Need a Learnable Classifier at the End of Deep Neural
    Network?", NeurIPS 2022, equation 1.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 1.0,
        normalize: bool = False,
        rotation: str | None = "random",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes)
        if num_classes < 2 or in_features < num_classes - 1:
            raise ValueError(
                "num_classes must be from 2 to in_features + 1 = "
                f"{in_features + 1}, got {num_classes}"
            )
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        if rotation not in ("random", None):
            raise ValueError(f"rotation must be 'random' or None, got {rotation!r}")
        self.in_features, self.out_features = in_features, num_classes
        self.scale, self.normalize = float(scale), normalize
        shape = (num_classes, in_features)
        empty = None if rotation is None else torch.empty(shape, device=device, dtype=dtype)
        self.register_buffer("weight", empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A new orientation, uniform over all of them."""
        if self.weight is None:
            return
        C, D = self.weight.shape
        gaussian = torch.randn(D, C - 1, dtype=torch.float64, device=self.weight.device)
        basis, triangle = torch.linalg.qr(gaussian)
        # LAPACK fixes the signs of the columns; those of the diagonal make the basis uniform
        basis = basis * triangle.diagonal().sign()
        self.weight.copy_(simplex_logits(basis).mT)

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x, self.in_features)
        if self.normalize:
            x = F.normalize(x, dim=-1)
        if self.weight is None:
            return self.scale * simplex_logits(x[..., : self.out_features - 1])
        return self.scale * F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale},"
            f" normalize={self.normalize}, rotation={'random' if self.weight is not None else None}"
        )
