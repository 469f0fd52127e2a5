"""Attention among the layers of a network, and among neighboring channels and places."""

import torch
from torch import Tensor, nn

from weft.nn.attention.heads import check_map
from weft.nn.checks import check_features, check_sizes
from weft.ops.attention.attention import attention


class LayerAttention(nn.Module):
    r"""HAN's layer attention: the maps of N layers are tokens that attend to each other.

    .. math::
        w_{ij} = \mathrm{softmax}_j(-\langle g_i, g_j \rangle), \qquad
        \text{out}_i = g_i + \alpha \sum_j w_{ij} \, g_j

    with :math:`g_i` all C H W numbers of the map of layer i. As in the authors' code, which
    subtracts the scores from their largest, layers attend to those that they are unlike; the paper
    has the softmax of the scores themselves (``sign=1``).

    Args:
        sign: -1 as in the authors' code, or 1 as in the paper.
        device, dtype: of alpha.

    Attributes:
        gamma: ``(1,)``, alpha, 0 at the beginning.

    Shapes: ``(B, N, C, H, W)`` to ``(B, N C, H, W)``.

    Raises:
        ValueError: maps of another shape, a sign that is none.
        TypeError: maps that are not floating-point.

    Source: Niu et al., "Single Image Super-Resolution via a Holistic Attention Network",
    ECCV 2020, equations 4 and 5.
    """

    def __init__(self, *, sign: int = -1, device=None, dtype=None):
        super().__init__()
        if sign not in (-1, 1):
            raise ValueError(f"sign must be -1 or 1, got {sign!r}")
        self.sign = sign
        self.gamma = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x)
        if x.dim() != 5:
            raise ValueError(f"x must be (B, N, C, H, W), got {tuple(x.shape)}")
        layers = x.flatten(2)
        out = attention(layers, layers, layers, scale=float(self.sign)).view(x.shape)
        return (self.gamma * out + x).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"sign={self.sign}"


class ChannelSpatialAttention(nn.Module):
    r"""HAN's channel-spatial attention: a gate for every number of a map, from its neighbors.

    .. math::
        \text{out} = x + \beta \, \sigma(W * x) \odot x

    with a 3 x 3 x 3 convolution over channels, rows and columns.

    Args:
        channels: C.
        device, dtype: of the parameters.

    Attributes:
        conv: the convolution. gamma: ``(1,)``, beta, 0 at the beginning.

    Shapes: ``(B, C, H, W)`` to the same.

    Raises:
        ValueError: sizes, maps of another shape.
        TypeError: maps that are not floating-point.

    Source: Niu et al., "Single Image Super-Resolution via a Holistic Attention Network",
    ECCV 2020, equation 6.
    """

    def __init__(self, channels: int, *, device=None, dtype=None):
        super().__init__()
        check_sizes(channels=channels)
        self.channels = channels
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv3d(1, 1, 3, padding=1, **factory)
        self.gamma = nn.Parameter(torch.zeros(1, **factory))

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.channels)
        gate = self.gamma * self.conv(x[:, None]).sigmoid()[:, 0]
        return x * gate + x

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
