"""Attention of each place of a map to a window around it."""

import torch
from torch import Tensor, nn

from weft.masks import Neighborhood
from weft.nn.attention.heads import (
    check_grid,
    check_heads,
    check_map,
    grid_offsets,
    merge_heads,
    size_pair,
    split_heads,
)
from weft.nn.attention.residues import one_hot, relative_columns
from weft.nn.checks import check_features, check_sizes
from weft.ops.attention.attention import attention
from weft.ops.attention.biases import LowRankBias


class NeighborhoodAttention(nn.Module):
    r"""Self-attention of each place to the k x k window that lies around it.

    .. math::
        \text{out}_i = W_o \sum_{j \in w(i)} \mathrm{softmax}_j\Big(
            \frac{\langle q_i, k_j \rangle}{\sqrt{D}} + T[(y_j - y_i) / d, (x_j - x_i) / d]\Big)
            \, v_j

    per head. The window is dilated by d, and moved where it would leave the map: every place has
    k² neighbours, and the places of one residue modulo d form maps of their own.

    Args:
        dim: C, of the map.
        num_heads: divides dim.
        kernel: k, odd; height and width may differ.
        dilation: d, likewise.
        relative_bias: whether there is a learned T.
        qkv_bias: whether queries, keys and values have a bias.
        device, dtype: of the parameters.

    Attributes:
        rpb: ``(num_heads, 2 k_h - 1, 2 k_w - 1)`` or None, T by the offset of the key; qkv, proj:
            linear layers. The names are those of NATTEN.

    Shapes: ``(B, H, W, C)`` to the same, H >= k_h d_h, W >= k_w d_w.

    Raises:
        ValueError: sizes below 1, an even kernel, a map of another width or smaller than the
            window.
        TypeError: features that are not floating-point.

    Source: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, section 3;
    Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        *,
        relative_bias: bool = True,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        self.kernel = size_pair("kernel", kernel)
        self.dilation = size_pair("dilation", dilation)
        if not all(k % 2 for k in self.kernel):
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.dim, self.num_heads = dim, num_heads
        factory = {"device": device, "dtype": dtype}
        table = (num_heads, *(2 * k - 1 for k in self.kernel))
        table = nn.Parameter(torch.empty(table, **factory)) if relative_bias else None
        self.register_parameter("rpb", table)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A new table, small; the linear layers have their own ``reset_parameters``."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_grid("x", x, self.dim)
        shape = tuple(x.shape[1:3])
        least = tuple(k * d for k, d in zip(self.kernel, self.dilation, strict=True))
        if any(n < m for n, m in zip(shape, least, strict=True)):
            raise ValueError(f"x must be of at least {least} places, got {shape}")
        query, key, value = (
            split_heads(part, self.num_heads) for part in self.qkv(x.flatten(1, 2)).chunk(3, -1)
        )
        bias = None
        if self.rpb is not None:
            options = {"clamp": True, "device": x.device}
            entries, residue = relative_columns(shape, self.kernel, self.dilation, **options)
            u = self.rpb.flatten(1)[:, entries]
            bias = LowRankBias(u[None], one_hot(residue, entries.shape[1], u))
        mask = Neighborhood(shape, self.kernel, self.dilation)
        out = attention(query, key, value, mask=mask, bias=bias)
        return self.proj(merge_heads(out)).unflatten(1, shape)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kernel={self.kernel}, "
            f"dilation={self.dilation}, relative_bias={self.rpb is not None}"
        )


class LocalFrameAttention(nn.Module):
    r"""Each place of a frame attends to the places around it in the frames before.

    .. math::
        s_{i, (t, j)} = \frac{\langle q_i, k_{t, j} \rangle}{\sqrt{D}}
            + \langle u_{j - i}, q_i \rangle + c_{j - i}, \qquad
        \text{out}_i = W_o \, \mathrm{DWConv}_{5 \times 5}\Big(\sum_t \sum_{j \in w(i)}
            \mathrm{softmax}_{t, j}(s_{i, (t, j)}) \, v_{t, j}\Big)_i

    per head. w(i) is the window of (2r + 1)² places d apart around i, cut at the border. Queries,
    keys and values come from elsewhere (a key encoder, a value encoder) and are used as they are;
    the bias, learned for each offset within the window, depends on the query.

    Args:
        key_dim: of all heads' queries and keys together.
        value_dim: likewise of the values and the output.
        num_heads: divides both.
        radius: r.
        dilation: d.
        dropout: probability with which a channel of the convolution's output is dropped.
        device, dtype: of the parameters.

    Attributes:
        relative_emb_k, dw_conv.conv, projection: by the names of the authors' code.

    Shapes: query ``(B, key_dim, H, W)``, key ``(B, key_dim, T, H, W)``, value
    ``(B, value_dim, T, H, W)``, without the T for one frame; ``(B, value_dim, H, W)`` out.

    Raises:
        ValueError: sizes below 1, a dropout out of range, shapes that do not match.
        TypeError: tensors that are not floating-point.

    Source: Yang et al., "ColorMNet: A Memory-based Deep Spatial-Temporal Feature Propagation
    Network for Video Colorization", ECCV 2024, local attention; as in the authors' code, with its
    one frame made T.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        num_heads: int = 1,
        radius: int = 7,
        dilation: int = 1,
        *,
        dropout: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(key_dim=key_dim, value_dim=value_dim, num_heads=num_heads)
        check_sizes(radius=radius, dilation=dilation)
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(
                f"key_dim and value_dim must be multiples of num_heads = {num_heads}, "
                f"got {key_dim} and {value_dim}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to less than 1, got {dropout}")
        self.key_dim, self.value_dim, self.num_heads = key_dim, value_dim, num_heads
        self.radius, self.dilation = radius, dilation
        factory, offsets = {"device": device, "dtype": dtype}, (2 * radius + 1) ** 2
        self.relative_emb_k = nn.Conv2d(
            key_dim, num_heads * offsets, 1, groups=num_heads, **factory
        )
        conv = nn.Conv2d(
            value_dim, value_dim, 5, padding=2, groups=value_dim, bias=False, **factory
        )
        self.dw_conv = nn.Sequential()
        self.dw_conv.add_module("conv", conv)
        self.dw_conv.add_module("dropout", nn.Dropout2d(dropout))
        self.projection = nn.Linear(value_dim, value_dim, **factory)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        check_map("query", query, self.key_dim)
        for name, x, dim in (("key", key, self.key_dim), ("value", value, self.value_dim)):
            check_features(name, x)
            frames = x.shape[2:-2]
            expected = (len(query), dim, *frames, *query.shape[2:])
            if x.dim() not in (4, 5) or 0 in frames or x.shape != expected:
                raise ValueError(
                    f"{name} must be ({len(query)}, {dim}, [T,] H, W) with the query's "
                    f"{tuple(query.shape[2:])} places, got {tuple(x.shape)}"
                )
        if key.shape[2:] != value.shape[2:]:
            raise ValueError(f"value must be of the key's frames, got {tuple(value.shape)}")
        H, W = query.shape[2:]
        T = key.shape[2] if key.dim() == 5 else 1
        window, step = (2 * self.radius + 1,) * 2, (self.dilation,) * 2
        options = {"clamp": False, "device": query.device}
        entries, residue = relative_columns((H, W), window, step, **options)
        by_offset = self.relative_emb_k(query).unflatten(1, (self.num_heads, -1)).flatten(3).mT
        u = by_offset.gather(3, entries.expand_as(by_offset))
        bias = LowRankBias(u, one_hot(residue, entries.shape[1], u).repeat(1, 1, T, 1))
        mask = self._window(H, W, query.device).repeat(1, T)
        heads = (split_heads(t.flatten(2).mT, self.num_heads) for t in (query, key, value))
        out = attention(*heads, mask=mask, bias=bias)
        out = self.dw_conv(merge_heads(out).mT.unflatten(2, (H, W)))
        return self.projection(out.movedim(1, 3)).movedim(3, 1)

    def _window(self, height: int, width: int, device) -> Tensor:
        """``(N, N)`` bool: the keys that each query sees in one frame."""
        rows, columns = (offset.abs() for offset in grid_offsets(height, width, device))
        near = torch.maximum(rows, columns) <= self.radius * self.dilation
        return near & (rows % self.dilation == 0) & (columns % self.dilation == 0)

    def extra_repr(self) -> str:
        return (
            f"key_dim={self.key_dim}, value_dim={self.value_dim}, num_heads={self.num_heads}, "
            f"radius={self.radius}, dilation={self.dilation}"
        )
