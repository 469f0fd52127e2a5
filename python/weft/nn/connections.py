"""Residual connections of several streams, mixed by doubly stochastic matrices."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, check_sizes, full_precision
from weft.ops.transport.doubly_stochastic import doubly_stochastic


class DoublyStochasticConnections(nn.Module):
    r"""mHC: n residual streams around a layer F in place of one.

    .. math::
        x' &= \mathrm{RMSNorm}(\mathrm{vec}(x)), \qquad
        [\tilde p, \tilde q, \tilde R] = \alpha \odot (x' \Phi) + b \\
        p &= \sigma(\tilde p), \quad q = 2 \sigma(\tilde q), \quad
        R = \mathrm{SinkhornKnopp}(\tilde R) \\
        y_i &= \sum_j R_{ij} x_j + q_i\, F\Big(\sum_j p_j x_j\Big)

    for every token by itself: R has rows and columns that sum to 1 (T iterations from
    exp(R̃), columns and then rows), so a stack of such layers neither amplifies nor loses the mean
    of the streams. α is a number for each of p, q and R.

    At the beginning Φ is 0 up to noise and b makes p = 1/n, q = 1 and R nearly the identity: with
    equal streams that is x + F(x). This choice of b is ours.

    Args:
        features: C, of one stream.
        streams: n >= 2; 4 in DeepSeek V4.
        iterations: T >= 1, of the normalisations; 20 in DeepSeek V4.
        stabilizer: 0 for the formulas above. The DeepSeek V4 models have 1e-6: it is added to p,
            and R is that of ``weft.doubly_stochastic`` with it. Their matrix is the transpose of R,
            and so are their weights for it.
        norm_eps: of the RMSNorm, which has no weight.

    Attributes:
        weight: Φ, ``(n (n + 2), n C)``: rows for p, for q, and for the rows of R.
        bias: b, ``(n (n + 2),)``.
        scale: α, ``(3,)``, begins at 0.01.

    Shapes: streams ``(..., n, C)``, alike after the layer; what the layer sees ``(..., C)``. The
    mixing weights are computed in float32 or wider, also under autocast.

    Raises:
        ValueError: sizes, shapes, what ``weft.doubly_stochastic`` refuses.
        TypeError: streams that are not floating-point.

    Source: Xie et al., "mHC: Manifold-Constrained Hyper-Connections", 2026. The order of the
    normalisations and the stabilizer are those of the DeepSeek V4 model of the transformers
    library.
    """

    def __init__(
        self,
        features: int,
        streams: int = 4,
        *,
        iterations: int = 20,
        stabilizer: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        check_sizes(features=features, streams=streams, iterations=iterations)
        if streams < 2:
            raise ValueError(f"streams must be >= 2, got {streams}")
        self.features, self.streams = features, streams
        self.iterations, self.stabilizer, self.norm_eps = iterations, stabilizer, norm_eps
        n = streams
        self.weight = nn.Parameter(torch.empty(n * (n + 2), n * features))
        self.bias = nn.Parameter(torch.empty(n * (n + 2)))
        self.scale = nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        n = self.streams
        nn.init.normal_(self.weight, std=0.02)
        nn.init.constant_(self.scale, 0.01)
        with torch.no_grad():
            read, write, mix = self.bias.split([n, n, n * n])
            read.fill_(-math.log(n - 1))
            write.zero_()
            mix.copy_((8.0 * torch.eye(n)).flatten() - 8.0)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p ``(..., n)``, q ``(..., n)`` and R ``(..., n, n)`` of streams ``(..., n, C)``."""
        check_features("x", x, self.features)
        n = self.streams
        if x.dim() < 2 or x.shape[-2] != n:
            raise ValueError(f"x must be (..., {n}, {self.features}), got {tuple(x.shape)}")
        with full_precision(x):
            wide = at_least_float32(x).flatten(-2)
            inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm_eps)
            logits = F.linear(wide, self.weight.to(wide.dtype)) * inverse
            sizes = torch.tensor([n, n, n * n], device=x.device)
            scale = self.scale.to(wide.dtype).repeat_interleave(sizes, output_size=n * (n + 2))
            read, write, mix = (logits * scale + self.bias.to(wide.dtype)).split([n, n, n * n], -1)
            R = doubly_stochastic(
                mix.unflatten(-1, (n, n)), self.iterations, stabilizer=self.stabilizer
            )
            return read.sigmoid() + self.stabilizer, 2 * write.sigmoid(), R

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        p, q, R = self.weights(x)
        with full_precision(x):
            wide = x.to(p.dtype)
            read = (p[..., None, :] @ wide).squeeze(-2).to(x.dtype)
        out = layer(read)
        with full_precision(x):
            mixed = R @ wide + q[..., None] * out.to(p.dtype)[..., None, :]
        return mixed.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.features}, streams={self.streams}, iterations={self.iterations}, "
            f"stabilizer={self.stabilizer}"
        )
