"""Pixel-level consistency of two views of one image."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import check_features, check_sizes


class PixelPropagation(nn.Module):
    r"""Smooths a feature map: each pixel becomes a sum over the pixels that look like it.

    .. math::
        y_i = \sum_j \max(\cos(x_i, x_j), 0)^\gamma \, \frac{g(x_j)}{\lVert g(x_j) \rVert}

    Args:
        channels: D.
        gamma: the sharpness, > 0.
        layers: of g: 0 for the identity, 1 for a 1 x 1 convolution, 2 for two with batch
            normalisation and a ReLU between them.
        device, dtype: of the parameters.

    Shapes: ``(B, D, H, W)`` to the same.

    Raises:
        ValueError: numbers out of range, a feature map of another size.
        TypeError: features that are not floating-point.

    Source: Xie et al., "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised
    Visual Representation Learning", CVPR 2021, equations 3 and 4.
    """

    def __init__(
        self, channels: int, gamma: float = 2.0, layers: int = 1, *, device=None, dtype=None
    ):
        super().__init__()
        check_sizes(channels=channels)
        if not gamma > 0:
            raise ValueError(f"gamma must be > 0, got {gamma}")
        if layers not in (0, 1, 2):
            raise ValueError(f"layers must be 0, 1 or 2, got {layers!r}")
        factory = {"device": device, "dtype": dtype}
        convolution = lambda: nn.Conv2d(channels, channels, 1, **factory)  # noqa: E731
        if layers == 2:
            parts = (nn.BatchNorm2d(channels, **factory), nn.ReLU(), convolution())
            self.value = nn.Sequential(convolution(), *parts)
        else:
            self.value = convolution() if layers else nn.Identity()
        self.channels, self.gamma, self.layers = channels, float(gamma), layers

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x)
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        values = F.normalize(self.value(x), dim=1).flatten(2)
        unit = F.normalize(x, dim=1).flatten(2)
        cosines = (unit.mT @ unit).clamp(min=0)
        if self.gamma < 1:  # its power has no derivative at 0
            cosines = cosines + 1e-6
        return (values @ (cosines**self.gamma).mT).view(x.shape)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, gamma={self.gamma}, layers={self.layers}"


class PixelConsistencyLoss(nn.Module):
    r"""The propagated pixels of each view agree with those of the other at nearby places.

    .. math::
        L = -\frac1B \sum_b \mathop{\mathrm{mean}}_{(i, j) \in A_b} \cos(y_i, x'_j)
            - \frac1B \sum_b \mathop{\mathrm{mean}}_{(i, j) \in A_b} \cos(x_i, y'_j)

    x and x' are the feature maps of two crops by the momentum encoder, whose gradients stop, y and
    y' their propagated maps by the trained one. A holds the pairs of pixels whose centers, in the
    image that both crops come from, are closer than ``threshold`` diagonals of the larger of the
    two bins. A pair of crops without such pixels adds 0. The authors' code has twice this loss.

    Args:
        threshold: > 0, in diagonals of a bin.

    Shapes: four maps ``(B, D, H, W)``; two ``(B, 4)`` boxes: the coordinates x and y of the upper
    left, then of the lower right corner of each crop (exchanged where the crop is flipped); loss
    ``()``.

    Raises:
        ValueError: a threshold out of range, shapes that do not match.
        TypeError: features that are not floating-point.

    Source: Xie et al., "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised
    Visual Representation Learning", CVPR 2021, equations 1 and 5.
    """

    def __init__(self, threshold: float = 0.7):
        super().__init__()
        if not threshold > 0:
            raise ValueError(f"threshold must be > 0, got {threshold}")
        self.threshold = float(threshold)

    def forward(
        self,
        y: Tensor,
        y_other: Tensor,
        x: Tensor,
        x_other: Tensor,
        boxes: Tensor,
        boxes_other: Tensor,
    ) -> Tensor:
        check_features("y", y)
        if y.dim() != 4 or not all(t.shape == y.shape for t in (y_other, x, x_other)):
            shapes = [tuple(t.shape) for t in (y, y_other, x, x_other)]
            raise ValueError(f"the four maps must be of one shape (B, D, H, W), got {shapes}")
        B, _, H, W = y.shape
        for name, box in (("boxes", boxes), ("boxes_other", boxes_other)):
            check_features(name, box, 4)
            if box.shape != (B, 4):
                raise ValueError(f"{name} must be ({B}, 4), got {tuple(box.shape)}")
        near = near_pixels(boxes, boxes_other, H, W, self.threshold)
        there = self._agreement(y, x_other.detach(), near)
        back = self._agreement(y_other, x.detach(), near.mT)
        return -(there + back).sum() / max(B, 1)

    @staticmethod
    def _agreement(y: Tensor, x: Tensor, near: Tensor) -> Tensor:
        """The mean cosine over the pairs that are near, ``(B,)``."""
        cosines = F.normalize(y, dim=1).flatten(2).mT @ F.normalize(x, dim=1).flatten(2)
        return cosines.masked_fill(~near, 0).sum((1, 2)) / near.sum((1, 2)).clamp(min=1)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


def near_pixels(boxes: Tensor, others: Tensor, H: int, W: int, threshold: float) -> Tensor:
    """``(B, HW, HW)`` bool: the pairs of pixels of two crops that are near in the image."""

    def centers(boxes):
        corner, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
        cells = boxes.new_tensor([W, H])
        grid = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        places = torch.stack(grid[::-1], -1).reshape(-1, 2).to(boxes) + 0.5  # x, y
        bins = size / cells
        return corner[:, None] + places * bins[:, None], bins.norm(dim=1)

    (own, diagonal), (other, other_diagonal) = centers(boxes), centers(others)
    distance = (own[:, :, None] - other[:, None]).norm(dim=3)
    return distance / torch.maximum(diagonal, other_diagonal)[:, None, None] < threshold
