"""Attention within windows of a feature map, shifted or not, as in Swin."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.attention.heads import (
    check_grid,
    check_heads,
    grid_offsets,
    merge_heads,
    size_pair,
)
from weft.ops.attention.biases import RelativeBias
from weft.ops.attention.window import window_attention


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """``(B, H, W, C)`` -> ``(B nW, window, C)``, the windows of an image row by row."""
    (B, H, W, C), (h, w) = x.shape, window
    x = x.reshape(B, H // h, h, W // w, w, C)
    return x.transpose(2, 3).reshape(B * (H // h) * (W // w), h * w, C)


def merge(windows: Tensor, window: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of :func:`partition`."""
    (h, w), C = window, windows.shape[-1]
    x = windows.reshape(-1, height // h, width // w, h, w, C)
    return x.transpose(2, 3).reshape(-1, height, width, C)


def region_ids(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], device=None
) -> Tensor:
    """``(nW, window)``: a shifted map is a torus, so that the last windows hold places from both
    ends; in one window, those of one label are neighbours in the map."""
    rows = torch.arange(height, device=device) >= height - shift[0]
    columns = torch.arange(width, device=device) >= width - shift[1]
    labels = 2 * rows[:, None].long() + columns.long()
    return partition(labels[None, ..., None], window)[..., 0]


class WindowAttention(nn.Module):
    r"""Self-attention within the windows of a feature map, with a learned bias by relative place.

    .. math::
        \text{out}_i = W_o \sum_{j \in \text{window}(i)} \mathrm{softmax}_j\Big(
            \frac{\langle q_i, k_j \rangle}{\sqrt{D}} + T[y_i - y_j, x_i - x_j]\Big) \, v_j

    per head, D = dim / num_heads. With a shift, the map is rolled up and to the left before it is
    cut, and back afterwards; places that only the rolling has brought together do not attend to
    each other. A map that the window does not divide is padded with zeros below and to the right,
    *before* it is rolled (as in the authors' detection code, torchvision and transformers; timm
    rolls first); the padding takes part as keys, and its outputs are dropped. No shift is made
    along a side that one window covers.

    Args:
        dim: C, of the map.
        num_heads: divides dim.
        window: its height and width.
        shift: from 0 to less than the window; half the window in every second layer of Swin.
        qkv_bias: whether queries, keys and values have a bias.
        device, dtype: of the parameters.

    Attributes:
        relative_position_bias_table: ``((2h - 1)(2w - 1), num_heads)``, T.
        qkv, proj: linear layers. The three names are those of Swin's and of timm's
            ``WindowAttention``, whose state this layer loads.

    Shapes: ``(B, H, W, C)`` to the same.

    Raises:
        ValueError: sizes below 1, a shift out of range, a map of another size.
        TypeError: features that are not floating-point.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    ICCV 2021, equation 4 and section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | tuple[int, int] = 7,
        shift: int | tuple[int, int] = 0,
        *,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        self.window, self.shift = size_pair("window", window), size_pair("shift", shift, 0)
        if not all(s < w for s, w in zip(self.shift, self.window, strict=True)):
            raise ValueError(f"shift must be below the window {self.window}, got {self.shift}")
        self.dim, self.num_heads = dim, num_heads
        factory = {"device": device, "dtype": dtype}
        h, w = self.window
        table = torch.empty((2 * h - 1) * (2 * w - 1), num_heads, **factory)
        self.relative_position_bias_table = nn.Parameter(table)
        rows, columns = grid_offsets(h, w, device)  # key minus query; Swin counts the other way
        index = (h - 1 - rows) * (2 * w - 1) + (w - 1 - columns)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A new table, small; the linear layers have their own ``reset_parameters``."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_grid("x", x, self.dim)
        H, W = x.shape[1:3]
        h, w = self.window
        # whole windows, counted: a compiler of any size then sees that h and w divide the map
        height, width = (H + h - 1) // h * h, (W + w - 1) // w * w
        x = F.pad(x, (0, 0, 0, width - W, 0, height - H))
        shift = (self.shift[0] if height > h else 0, self.shift[1] if width > w else 0)
        regions = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            regions = region_ids(height, width, self.window, shift, x.device)
        parts = self.qkv(partition(x, self.window)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        bias = RelativeBias(self.relative_position_bias_table, self.relative_position_index)
        out = window_attention(query, key, value, bias=bias, region_ids=regions)
        out = merge(self.proj(merge_heads(out)), self.window, height, width)
        return (out.roll(shift, (1, 2)) if any(shift) else out)[:, :H, :W]

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window={self.window}, shift={self.shift}"
        )
