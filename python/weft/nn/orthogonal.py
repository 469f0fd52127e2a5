"""Layers that turn features and keep all that is in them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from weft.nn.checks import at_least_float32, check_features, check_labels, check_sizes

MAPS = ("matrix_exp", "cayley", "householder")


def orthogonal_linear(
    features: int, *, parametrization: str = "matrix_exp", device=None, dtype=None
) -> nn.Linear:
    r"""A square linear layer :math:`x \mapsto Q x` whose weight is orthogonal at every step.

    The optimizer moves a free matrix, of which Q is a function (``torch.nn.utils.parametrizations``
    keeps it), so any optimizer will do. Lengths, angles and distances of features are those of
    before; ``layer.weight.mT`` undoes it.

    Args:
        features: D.
        parametrization: how Q comes about: ``"matrix_exp"``, ``"cayley"`` or ``"householder"``.
        device, dtype: of the weight.

    Returns:
        ``torch.nn.Linear`` without a bias, its weight uniform over the orthogonal matrices.

    Raises:
        ValueError: a size < 1, a parametrization that is none.

    Source: Lezcano-Casado and Martinez-Rubio, "Cheap Orthogonal Constraints in Neural Networks: A
    Simple Parametrization of the Orthogonal and Unitary Group", ICML 2019.
    """
    check_sizes(features=features)
    if parametrization not in MAPS:
        raise ValueError(f"parametrization must be one of {MAPS}, got {parametrization!r}")
    layer = nn.Linear(features, features, bias=False, device=device, dtype=dtype)
    nn.init.orthogonal_(layer.weight)
    return orthogonal(layer, orthogonal_map=parametrization)


class OrthogonalCompatibleLayer(nn.Module):
    r"""Splits features into what an older model can be compared with and all that is known.

    .. math::
        \text{compatible} = x_{1 \dots d}, \qquad \text{output} = Q x, \qquad Q^\top Q = I

    The backbone gives d + extra dimensions. The first d are trained to match the features of the
    old model, by :func:`backward_compatible_loss`; the classifier sees Qx, which holds the same
    information in directions of its own choice, so that the two aims do not have to share
    coordinates. As Q keeps lengths and angles, x serves retrieval as well as Qx: old galleries
    through its first d coordinates, without an update. (The published code adds a bias to Qx, which
    a classifier with a bias of its own does not need.)

    Args:
        old_features: d, dimensions of the old model.
        extra_features: dimensions for what is new, >= 0.
        parametrization: as in :func:`orthogonal_linear`.
        device, dtype: of the weight.

    Attributes:
        rotation: ``torch.nn.Linear``, its weight Q ``(d + extra, d + extra)``.

    Shapes: features ``(..., d + extra)``, results ``(..., d)`` and ``(..., d + extra)``.

    Raises:
        ValueError: sizes, features of another size, a parametrization that is none.
        TypeError: features that are not floating-point.

    Source: Ricci et al., "Backward-Compatible Aligned Representations via an Orthogonal
    Transformation Layer", ECCV 2024 Workshops.
    """

    def __init__(
        self,
        old_features: int,
        extra_features: int,
        *,
        parametrization: str = "matrix_exp",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(old_features=old_features)
        _check_extra(extra_features)
        self.old_features = old_features
        self.out_features = old_features + extra_features
        self.rotation = orthogonal_linear(
            self.out_features, parametrization=parametrization, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_features("x", x, self.out_features)
        return x[..., : self.old_features], self.rotation(x)


class BasisTransformation(nn.Module):
    r"""Joins new features with a few extra dimensions of old ones, and loses nothing of either.

    .. math::
        z = [\, \hat e, \; P (C \hat f) \,], \qquad
        \text{output} = [\, Q \, z_{1 \dots d}, \; z_{d+1 \dots} \,], \qquad
        P^\top P = I, \; Q^\top Q = I

    f are the features of the new model (D dimensions, trained to match an independent new model),
    e the extra dimensions of the branch that imitates the old model. The first d coordinates of the
    output are trained to match the old model's features, and d of the old model is all that a query
    on an old gallery needs. P and Q are orthogonal, so
    :math:`\langle \text{out}, \text{out}' \rangle = \langle \hat e, \hat e' \rangle + C^2 \langle
    \hat f, \hat f' \rangle`: a retrieval by the whole output is one by the new features, refined.

    Args:
        in_features: D of f.
        old_features: d of the old model, at most D + extra.
        extra_features: dimensions of e, >= 1.
        scale: C, > 0, the weight of the new features against the extra ones.
        parametrization: as in :func:`orthogonal_linear`.
        device, dtype: of the weights.

    Attributes:
        turn_new, turn_old: ``torch.nn.Linear`` with the weights P and Q.

    Shapes: features ``(..., D)``, old branch ``(..., >= extra)``, of which the first ``extra`` are
    taken; results ``(..., d)`` and ``(..., D + extra)``, the second beginning with the first.

    Raises:
        ValueError: sizes, features of another size, a scale or parametrization that is none.
        TypeError: features that are not floating-point.

    Source: Zhou et al., "BT^2: Backward-compatible Training with Basis Transformation", ICCV 2023.
    """

    def __init__(
        self,
        in_features: int,
        old_features: int,
        extra_features: int,
        *,
        scale: float = 3.0,
        parametrization: str = "matrix_exp",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(
            in_features=in_features, old_features=old_features, extra_features=extra_features
        )
        if old_features > in_features + extra_features:
            raise ValueError(
                "old_features must be at most in_features + extra_features = "
                f"{in_features + extra_features}, got {old_features}"
            )
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        self.in_features, self.old_features = in_features, old_features
        self.extra_features, self.scale = extra_features, float(scale)
        options = {"parametrization": parametrization, "device": device, "dtype": dtype}
        self.turn_new = orthogonal_linear(in_features, **options)
        self.turn_old = orthogonal_linear(old_features, **options)

    def forward(self, features: Tensor, old_branch: Tensor) -> tuple[Tensor, Tensor]:
        check_features("features", features, self.in_features)
        check_features("old_branch", old_branch)
        if old_branch.shape[:-1] != features.shape[:-1] or (
            old_branch.shape[-1] < self.extra_features
        ):
            shape = (*features.shape[:-1], f">= {self.extra_features}")
            raise ValueError(f"old_branch must be {shape}, got {tuple(old_branch.shape)}")
        extra = F.normalize(old_branch[..., : self.extra_features], dim=-1)
        new = self.turn_new(self.scale * F.normalize(features, dim=-1))
        joined = torch.cat([extra.to(new.dtype), new], -1)
        compatible = self.turn_old(joined[..., : self.old_features])
        return compatible, torch.cat([compatible, joined[..., self.old_features :]], -1)

    def extra_repr(self) -> str:
        return f"extra_features={self.extra_features}, scale={self.scale}"


def backward_compatible_loss(
    features: Tensor, old_prototypes: Tensor, labels: Tensor, *, weight: float = 0.5
) -> Tensor:
    r"""Keeps features classifiable by, and close to, the class means of an old model.

    .. math::
        L = \frac1B \sum_b \Big( \mathrm{CE}(\hat x_b \hat P^\top, y_b) + w \, (1 - \langle \hat
        x_b, \hat p_{y_b} \rangle) \Big)

    Args:
        features: ``(B, d)``, the compatible part of the new features.
        old_prototypes: ``(C, d)``, class means of the old model's features; no gradient reaches
            them.
        labels: ``(B,)`` int64.
        weight: w, >= 0; the published code has 5 to 10.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes, labels outside the classes, a weight < 0.
        TypeError: tensors that are not floating-point, labels that are not int64.

    Source: Ricci et al., "Backward-Compatible Aligned Representations via an Orthogonal
    Transformation Layer", ECCV 2024 Workshops; the cross entropy by an old classifier: Shen et al.,
    "Towards Backward-Compatible Representation Learning", CVPR 2020.
    """
    check_features("old_prototypes", old_prototypes)
    if old_prototypes.dim() != 2:
        raise ValueError(f"old_prototypes must be (C, d), got {tuple(old_prototypes.shape)}")
    check_features("features", features, old_prototypes.shape[1])
    if features.dim() != 2:
        raise ValueError(f"features must be (B, d), got {tuple(features.shape)}")
    check_labels("labels", labels, features.shape[:1], len(old_prototypes))
    if not weight >= 0:
        raise ValueError(f"weight must be >= 0, got {weight}")
    cosine = F.normalize(features, dim=1) @ F.normalize(old_prototypes.detach(), dim=1).mT
    cosine = at_least_float32(cosine)
    own = cosine.gather(1, labels[:, None])
    return F.cross_entropy(cosine, labels) + weight * (1 - own).mean()


def _check_extra(extra_features: int) -> None:
    if not isinstance(extra_features, int) or extra_features < 0:
        raise ValueError(f"extra_features must be an integer >= 0, got {extra_features!r}")
