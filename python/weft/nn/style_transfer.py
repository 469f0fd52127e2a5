"""Style features rearranged for the content, and losses between sets of features."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, check_sizes, full_precision
from weft.ops.attention.attention import attention
from weft.ops.pairwise.pairwise import pairwise


def relaxed_earth_mover_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""The larger of two lower bounds of the earth mover's distance, by nearest points.

    .. math::
        \text{out} = \max\Big( \frac1N \sum_i \min_j C_{ij}, \; \frac1M \sum_j \min_i C_{ij} \Big),
        \qquad C_{ij} = 1 - \cos(x_i, y_j)

    Each bound drops one marginal of the transport. The matrix of costs is never stored, forward or
    backward.

    Args:
        x: ``(N, D)`` or ``(B, N, D)``, N >= 1.
        y: ``(M, D)`` or ``(B, M, D)``, M >= 1.

    Returns:
        ``()`` or ``(B,)``, in the dtype of x. Differentiable twice; of equal points the first has
        the gradient. PAMA's code averages both bounds over a batch before it takes the larger.

    Raises:
        ValueError: shapes that do not match, no points.
        TypeError: dtypes that differ or are not supported.

    Source: Kolkin et al., "Style Transfer by Relaxed Optimal Transport and Self-Similarity", CVPR
    2019, section 2.3; Luo et al., "Consistent Style Transfer", 2022, section 3.
    """
    _check_sets(x, y)
    if x.dim() == 3:
        values = [relaxed_earth_mover_distance(*pair) for pair in zip(x, y, strict=True)]
        return torch.stack(values) if values else x.new_zeros(0)
    of_x, of_y = pairwise(x, y, pair="cosine", reduce="max", over="both")
    return torch.maximum((1 - of_x.values).mean(), (1 - of_y.values).mean())


def moment_matching_loss(x: Tensor, y: Tensor) -> Tensor:
    r"""How far apart the means and the covariances of two sets of features are.

    .. math::
        \text{out} = \frac1D \lVert \mu_x - \mu_y \rVert_1
            + \frac{1}{D^2} \lVert \Sigma_x - \Sigma_y \rVert_1

    Means and covariances are over the points. (PAMA's code subtracts from each point the mean of
    its own channels in their place.)

    Args:
        x: ``(N, D)`` or ``(B, N, D)``, N >= 2.
        y: ``(M, D)`` or ``(B, M, D)``, M >= 2.

    Returns:
        ``()`` or ``(B,)`` in float32 or wider.

    Raises:
        ValueError: shapes that do not match, too few points.
        TypeError: features that are not floating-point.

    Source: Kolkin et al., "Style Transfer by Relaxed Optimal Transport and Self-Similarity", CVPR
    2019, section 2.3; Luo et al., "Consistent Style Transfer", 2022, section 3.
    """
    _check_sets(x, y, least=2)
    with full_precision(x):
        (mean_x, covariance_x), (mean_y, covariance_y) = _moments(x), _moments(y)
        means = (mean_x - mean_y).abs().mean(-1)
        return means + (covariance_x - covariance_y).abs().mean((-2, -1))


def self_similarity_loss(x: Tensor, y: Tensor) -> Tensor:
    r"""Whether the points of two sets are alike among themselves in the same way.

    .. math::
        \text{out} = \frac{1}{N^2} \sum_{ij}
            \lvert \cos(x_i, x_j) - \cos(y_i, y_j) \rvert

    Point i of x belongs to point i of y: two feature maps of one size. As in PAMA's code, distances
    are not divided by their sums over a row.

    Args:
        x: ``(N, D)`` or ``(B, N, D)``, N >= 1.
        y: ``(N, E)`` or ``(B, N, E)``.

    Returns:
        ``()`` or ``(B,)`` in float32 or wider. Stores both matrices of cosines.

    Raises:
        ValueError: shapes that do not match.
        TypeError: features that are not floating-point.

    Source: Kolkin et al., "Style Transfer by Relaxed Optimal Transport and Self-Similarity", CVPR
    2019, section 2.4; Luo et al., "Consistent Style Transfer", 2022, section 3.
    """
    check_features("x", x)
    check_features("y", y)
    if x.dim() not in (2, 3) or y.shape[:-1] != x.shape[:-1] or not x.shape[-2]:
        raise ValueError(
            "x and y must be (N, D) and (N, E) or (B, N, D) and (B, N, E) with N >= 1, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    with full_precision(x):
        x, y = (F.normalize(at_least_float32(t), dim=-1) for t in (x, y))
        return (x @ x.mT - y @ y.mT).abs().mean((-2, -1))


def _check_sets(x: Tensor, y: Tensor, least: int = 1) -> None:
    check_features("x", x)
    check_features("y", y, x.shape[-1])
    if x.dim() not in (2, 3) or y.dim() != x.dim() or y.shape[:-2] != x.shape[:-2]:
        raise ValueError(
            "x and y must be (N, D) and (M, D) or (B, N, D) and (B, M, D), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    for name, t in (("x", x), ("y", y)):
        if t.shape[-2] < least:
            raise ValueError(f"{name} must have at least {least} points, got {t.shape[-2]}")


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = at_least_float32(x)
    mean = x.mean(-2, keepdim=True)
    centered = x - mean
    return mean.squeeze(-2), centered.mT @ centered / (x.shape[-2] - 1)


class ManifoldAlignment(nn.Module):
    r"""Rearranges the features of a style for a content, and mixes both place by place.

    .. math::
        A = \mathrm{softmax}\big(q(\hat F_c)^\top k(\hat F_s)\big), \quad
        F_r = o(A \, v(F_s)), \quad
        \text{out} = w \odot p_c(F_c) + (1 - w) \odot p_r(F_r), \quad
        w = \tfrac13 \sum_{n \in \{1, 3, 5\}} \sigma\big(f_n([F_c, F_r])\big)

    where F are the inputs behind one convolution that both share, a hat stands for mean 0 and
    deviation 1 of each channel, a ReLU6 is behind each projection of the attention, and :math:`f_n`
    is a convolution of n x n to one channel. The attention never stores A. PAMA applies three of
    these one after the other, each to the output of the one before and to the same style, and
    trains them with :func:`relaxed_earth_mover_distance`, :func:`moment_matching_loss` and
    :func:`self_similarity_loss`.

    Args:
        channels: D, even.
        device, dtype: of the parameters.

    Shapes: content ``(B, D, H, W)``, style ``(B, D, H', W')`` with sides >= 3, to the shape of the
    content.

    Raises:
        ValueError: an odd number of channels, shapes that do not match.
        TypeError: features that are not floating-point.

    Source: Luo et al., "Consistent Style Transfer", 2022, section 3.
    """

    def __init__(self, channels: int, *, device=None, dtype=None):
        super().__init__()
        check_sizes(channels=channels)
        if channels % 2:
            raise ValueError(f"channels must be even, got {channels}")
        self.channels, half = channels, channels // 2

        def convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
            padding = {"padding": size // 2, "padding_mode": "reflect"} if size > 1 else {}
            return nn.Conv2d(inputs, outputs, size, device=device, dtype=dtype, **padding)

        self.conv_in = convolution(channels, channels, 3)
        self.query, self.key, self.value = (convolution(channels, half, 1) for _ in range(3))
        self.out = convolution(half, channels, 1)
        self.conv_out = convolution(channels, channels, 3)
        self.joint = convolution(2 * channels, channels, 1)
        self.content, self.rearranged = (convolution(channels, channels, 1) for _ in range(2))
        self.gates = nn.ModuleList(convolution(channels, 1, size) for size in (1, 3, 5))

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        for name, x in (("content", content), ("style", style)):
            check_features(name, x)
            if x.dim() != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < 3:
                raise ValueError(
                    f"{name} must be (B, {self.channels}, H, W) with H, W >= 3, "
                    f"got {tuple(x.shape)}"
                )
        if len(style) != len(content):
            raise ValueError(f"style must have {len(content)} maps, got {len(style)}")
        content, style = (F.relu6(self.conv_in(x)) for x in (content, style))
        query = F.relu6(self.query(_normalized(content)))
        key = F.relu6(self.key(_normalized(style)))
        value = F.relu6(self.value(style))
        q, k, v = (t.flatten(2).mT for t in (query, key, value))
        rearranged = attention(q, k, v, scale=1.0).mT.unflatten(2, content.shape[2:])
        rearranged = F.relu6(self.conv_out(F.relu6(self.out(rearranged))))
        both = self.joint(torch.cat((content, rearranged), 1))
        weight = sum(torch.sigmoid(gate(both)) for gate in self.gates) / len(self.gates)
        return torch.lerp(self.rearranged(rearranged), self.content(content), weight)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def _normalized(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the places of each channel."""
    variance, mean = torch.var_mean(x, (2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()
