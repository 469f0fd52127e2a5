"""Polarized self-attention: gates for channels and for places that keep their full resolution."""

from torch import Tensor, nn

from weft.nn.attention.heads import check_map


class _ChannelGate(nn.Module):
    def __init__(self, channels: int, **factory):
        super().__init__()
        self.value = nn.Conv2d(channels, channels // 2, 1, **factory)
        self.query = nn.Conv2d(channels, 1, 1, **factory)
        self.out = nn.Conv2d(channels // 2, channels, 1, **factory)
        self.norm = nn.LayerNorm(channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        places = self.query(x).flatten(2).softmax(-1)
        pooled = self.value(x).flatten(2) @ places.mT
        gate = self.out(pooled[..., None]).flatten(1)
        return self.norm(gate).sigmoid()[..., None, None]


class _SpatialGate(nn.Module):
    def __init__(self, channels: int, **factory):
        super().__init__()
        self.value = nn.Conv2d(channels, channels // 2, 1, **factory)
        self.query = nn.Conv2d(channels, channels // 2, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        # the mean of a 1 x 1 convolution is the convolution of the mean: one place in place of HW
        channels = self.query(x.mean((2, 3), keepdim=True)).flatten(1).softmax(-1)
        gate = channels[:, None] @ self.value(x).flatten(2)
        return gate.sigmoid().view(len(x), 1, *x.shape[2:])


class PolarizedSelfAttention(nn.Module):
    r"""Two gates of a feature map, one per channel and one per place.

    .. math::
        A^{ch} &= \mathrm{sigmoid}\big(\mathrm{LN}(W_z \,
            V X \, \mathrm{softmax}_{HW}(w X)^T)\big) \in (0, 1)^C \\
        A^{sp} &= \mathrm{sigmoid}\big(\mathrm{softmax}_{C/2}(\mathrm{mean}_{HW} (Q X)) \,
            V' X\big) \in (0, 1)^{HW} \\
        Z &= A^{ch} \odot X + A^{sp} \odot X \;\; (\texttt{"parallel"}), \qquad
        Z = A^{sp}(Y) \odot Y, \; Y = A^{ch}(X) \odot X \;\; (\texttt{"sequential"})

    with X as C x HW; V, V', Q map C channels to C/2, w to one, and :math:`W_z` C/2 to C. Each gate
    collapses one dimension and keeps the other at full resolution: O(C HW + C²) work, no products
    of places with places.

    Args:
        channels: C, even.
        layout: ``"parallel"`` or ``"sequential"``.
        device, dtype: of the parameters.

    Shapes: ``(B, C, H, W)`` to the same.

    Raises:
        ValueError: an odd number of channels, an unknown layout, a map of another size.
        TypeError: features that are not floating-point.

    Source: Liu et al., "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
    2021, section 3: figure 2 and the equations of both branches and layouts.
    """

    def __init__(self, channels: int, layout: str = "parallel", *, device=None, dtype=None):
        super().__init__()
        if not isinstance(channels, int) or channels < 2 or channels % 2:
            raise ValueError(f"channels must be an even integer >= 2, got {channels!r}")
        if layout not in ("parallel", "sequential"):
            raise ValueError(f"layout must be 'parallel' or 'sequential', got {layout!r}")
        self.channels, self.layout = channels, layout
        self.channel = _ChannelGate(channels, device=device, dtype=dtype)
        self.spatial = _SpatialGate(channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.channels)
        if self.layout == "parallel":
            return x * self.channel(x) + x * self.spatial(x)
        x = x * self.channel(x)
        return x * self.spatial(x)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, layout={self.layout!r}"
