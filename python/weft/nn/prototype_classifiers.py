"""Classifiers by one prototype per class: learned, or the mean of the class's features."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import (
    at_least_float32,
    check_features,
    check_labels,
    check_sizes,
    full_precision,
)
from weft.nn.class_statistics import ClassStatistics


class CosineClassifier(nn.Module):
    r"""Logits by the angle between a feature and a learned direction of each class.

    .. math::
        \text{logit}_c = s \, (\cos(x, w_c) - m \, [c = y])

    Args:
        in_features: D.
        num_classes: C.
        scale: s, > 0; cosines alone would bound the probability that a class can reach.
        margin: m, >= 0: what the cosine of the right class has to be ahead by in training, used
            where labels are given.
        learn_scale: make s a parameter, which begins at ``scale`` and is learned as its logarithm,
            so that it stays positive.
        device, dtype: of the weight.

    Attributes:
        weight: ``(C, D)``, of any length: only directions count.

    Shapes: features ``(..., D)``, labels ``(...)`` int64, logits ``(..., C)``.

    Raises:
        ValueError: sizes, a scale or margin out of range, labels outside the classes.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Gidaris and Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018;
    the margin: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face
    Recognition", CVPR 2018, equation 4.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 16.0,
        margin: float = 0.0,
        learn_scale: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes)
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        if not margin >= 0:
            raise ValueError(f"margin must be >= 0, got {margin}")
        self.in_features, self.out_features = in_features, num_classes
        self.scale, self.margin = float(scale), float(margin)
        shape = (num_classes, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        log_scale = torch.empty((), device=device, dtype=dtype)
        self.register_parameter("log_scale", nn.Parameter(log_scale) if learn_scale else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New random directions, uniform on the sphere, and the scale of the beginning."""
        nn.init.normal_(self.weight)
        self.weight.copy_(F.normalize(self.weight, dim=1))
        if self.log_scale is not None:
            self.log_scale.fill_(math.log(self.scale))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        check_features("x", x, self.in_features)
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))
        if labels is not None:
            check_labels("labels", labels, x.shape[:-1], self.out_features)
            cosine = cosine - self.margin * F.one_hot(labels, self.out_features).to(cosine.dtype)
        scale = self.scale if self.log_scale is None else self.log_scale.exp().to(cosine.dtype)
        return scale * cosine

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scale={self.scale}, margin={self.margin}, learn_scale={self.log_scale is not None}"
        )


class NearestMeanClassifier(nn.Module):
    r"""Classifies by the nearest mean of the features that :meth:`update` has seen.

    .. math::
        \text{logit}_c = -\lVert x - \mu_c \rVert^2 \;\; (\texttt{"euclidean"}), \qquad
        \text{logit}_c = s \cos(x, \mu_c) \;\; (\texttt{"cosine"})

    Nothing is trained, and nothing is forgotten: a class that arrives later leaves the means of
    the others as they are. On a frozen pretrained backbone, ``"euclidean"`` is the nearest mean
    classifier and ``"cosine"`` is SimpleCIL; with the features of the pretrained and of the adapted
    backbone side by side, ``torch.cat([phi(x), phi_adapted(x)], -1)``, it is ADAM.

    Args:
        in_features: D.
        num_classes: C, with those still to come.
        metric: ``"euclidean"`` or ``"cosine"``.
        scale: s, > 0, of cosines.
        device, dtype: of the means; float64 or float32.

    Attributes:
        statistics: :class:`weft.nn.ClassStatistics`, count and mean of each class.

    Shapes: features ``(..., D)``, logits ``(..., C)``; ``-inf`` for a class without samples.
    Distances are computed in float32 or wider also under autocast, around the mean of the means:
    features far from the origin lose no digits.

    Raises:
        ValueError: sizes, a metric or scale that is none, labels outside the classes.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Janson et al., "A Simple Baseline that Questions the Use of Pretrained-Models in
    Continual Learning", 2022; Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained
    Models: Generalizability and Adaptivity are All You Need", IJCV 2024.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        metric: str = "euclidean",
        scale: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        self.statistics = ClassStatistics(in_features, num_classes, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, num_classes
        self.metric, self.scale = metric, float(scale)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds samples to the means: features ``(N, D)``, labels ``(N,)`` int64."""
        self.statistics.update(features, labels)

    def prototypes(self) -> Tensor:
        """``(C, D)``: what features are compared with."""
        return self.statistics.mean

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x, self.in_features)
        prototypes, unseen = self.prototypes(), (self.statistics.count == 0)[:, None]
        if self.metric == "cosine":
            directions = F.normalize(prototypes, dim=-1).to(x.dtype)
            logits = self.scale * F.linear(F.normalize(x, dim=-1), directions)
        else:
            # a class without samples must not pull the center of the distances to the origin
            center = prototypes.sum(0) / (~unseen).sum().clamp(min=1)
            prototypes = torch.where(unseen, center, prototypes)
            logits = -squared_distances(x, prototypes).to(x.dtype)
        return logits.masked_fill(unseen[:, 0], float("-inf"))

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, scale={self.scale}"


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``(..., D)``, ``(C, D)`` -> ``(..., C)``, in float32 or wider, around the mean of ``y``."""
    with full_precision(x):
        dtype = torch.promote_types(at_least_float32(x).dtype, y.dtype)
        center = y.detach().mean(0)
        x, y = x.to(dtype) - center, y.to(dtype) - center
        square = x.square().sum(-1, keepdim=True) + y.square().sum(-1)
        return (square - 2 * F.linear(x, y)).clamp(min=0)


def calibrate_prototypes(
    new: Tensor, base: Tensor, *, temperature: float = 16.0, shift: float = 0.5
) -> Tensor:
    r"""Moves prototypes of few samples towards the base prototypes that they resemble.

    .. math::
        \bar c_n = (1 - a) \, \hat c_n + a \, \widehat{\Delta}_n, \qquad
        \Delta_n = \sum_b \mathrm{softmax}_b(\tau \langle \hat c_b, \hat c_n \rangle) \, \hat c_b

    with a hat for division by the norm. The mean of a few samples is biased towards the base
    classes; their prototypes, of many samples, hold the same semantics without the noise.

    Args:
        new: ``(N, D)``, the means of the new classes.
        base: ``(B, D)``, the means of the base classes, B >= 1.
        temperature: :math:`\tau`, > 0; the larger, the fewer base classes count.
        shift: a, from 0 to 1.

    Returns:
        ``(N, D)``, to be compared by cosine.

    Raises:
        ValueError: shapes, no base class, a temperature or shift out of range.
        TypeError: tensors that are not floating-point.

    Source: Wang et al., "Few-Shot Class-Incremental Learning via Training-Free Prototype
    Calibration", NeurIPS 2023.
    """
    check_features("base", base)
    if base.dim() != 2 or not len(base):
        raise ValueError(f"base must be (B, D) with B >= 1, got {tuple(base.shape)}")
    check_features("new", new, base.shape[1])
    if new.dim() != 2:
        raise ValueError(f"new must be (N, {base.shape[1]}), got {tuple(new.shape)}")
    _check_calibration(temperature, shift)
    return _calibrate(new, base, None, temperature, shift)


def _check_calibration(temperature: float, shift: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if not 0 <= shift <= 1:
        raise ValueError(f"shift must be from 0 to 1, got {shift}")


def _calibrate(new, base, seen, temperature, shift):
    """A base class that is not seen has weight 0, and all have none before the first is."""
    new, base = F.normalize(new, dim=-1), F.normalize(base, dim=-1)
    similarity = temperature * (new @ base.mT)
    if seen is not None:
        similarity = similarity.masked_fill(~seen, torch.finfo(similarity.dtype).min)
    delta = F.normalize(similarity.softmax(-1) @ base, dim=-1)
    return (1 - shift) * new + shift * delta


class TEENClassifier(NearestMeanClassifier):
    r"""Cosine to the class means, those of the few-shot classes calibrated by the base classes.

    The first ``num_base`` classes have many samples; prototypes of the others are moved by
    :func:`calibrate_prototypes`. There is nothing to train and no step to call: the means are the
    state, and the calibration of C - num_base prototypes is part of the forward.

    Args:
        in_features: D.
        num_base: number of base classes, from 1 to C.
        num_classes: C, with those still to come.
        temperature, shift: as in :func:`calibrate_prototypes`.
        scale: of the cosines, > 0.
        device, dtype: of the means; float64 or float32.

    Shapes: features ``(..., D)``, logits ``(..., C)``; ``-inf`` for a class without samples.

    Raises:
        ValueError: sizes, a temperature, shift or scale out of range, labels outside the classes.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Wang et al., "Few-Shot Class-Incremental Learning via Training-Free Prototype
    Calibration", NeurIPS 2023.
    """

    def __init__(
        self,
        in_features: int,
        num_base: int,
        num_classes: int,
        *,
        temperature: float = 16.0,
        shift: float = 0.5,
        scale: float = 16.0,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_features, num_classes, metric="cosine", scale=scale, device=device, dtype=dtype
        )
        if not isinstance(num_base, int) or not 1 <= num_base <= num_classes:
            raise ValueError(f"num_base must be from 1 to {num_classes}, got {num_base!r}")
        _check_calibration(temperature, shift)
        self.num_base, self.temperature, self.shift = num_base, float(temperature), float(shift)

    def prototypes(self) -> Tensor:
        with full_precision(self.statistics.mean):
            base, new = self.statistics.mean.tensor_split([self.num_base])
            seen = self.statistics.count[: self.num_base] > 0
            calibrated = _calibrate(new, base, seen, self.temperature, self.shift)
            return torch.cat([base, calibrated])

    def extra_repr(self) -> str:
        return (
            f"num_base={self.num_base}, temperature={self.temperature}, shift={self.shift}, "
            f"scale={self.scale}"
        )
