"""Attention of pixels inside each patch, beside that of patches, as in TNT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.attention.heads import check_heads, check_tokens, merge_heads, split_heads
from weft.nn.checks import check_sizes
from weft.ops.attention.attention import attention


class _Attention(nn.Module):
    """Self-attention with one linear layer for queries and keys and one for values."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, **factory):
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        parts = (*self.qk(x).chunk(2, -1), self.v(x))
        heads = (split_heads(part, self.num_heads) for part in parts)
        return self.proj(merge_heads(attention(*heads)))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, **factory):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TNTBlock(nn.Module):
    r"""A transformer block of the pixels of each patch, then one of the patches.

    .. math::
        Y'_i &= Y_i + \mathrm{MSA}(\mathrm{LN}(Y_i)), \qquad
        Y_i \leftarrow Y'_i + \mathrm{MLP}(\mathrm{LN}(Y'_i)) \\
        Z_i &\leftarrow Z_i + \mathrm{LN}(W \, \mathrm{LN}(\mathrm{vec}(Y_i))), \quad i \geq 1 \\
        Z' &= Z + \mathrm{MSA}(\mathrm{LN}(Z)), \qquad
        Z \leftarrow Z' + \mathrm{MLP}(\mathrm{LN}(Z'))

    :math:`Y_i` holds the M pixels ("visual words") of patch i, Z the patches ("visual sentences")
    after a class token :math:`Z_0`. The two layer norms around W are those of the authors' code.

    Args:
        pixel_dim: c, of a pixel.
        dim: C, of a patch.
        num_pixels: M.
        pixel_heads, num_heads: of the inner and the outer attention; divide c and C.
        mlp_ratio: hidden width of the outer MLP over C; that of the inner is 4 c.
        qkv_bias: whether queries, keys and values have a bias.
        device, dtype: of the parameters.

    Attributes:
        norm_in, attn_in, norm_mlp_in, mlp_in, norm1_proj, proj, norm2_proj, norm_out, attn_out,
            norm_mlp, mlp: by the names of timm's ``Block``, whose state this layer loads.

    Shapes: pixels ``(B (N - 1), M, c)`` and patches ``(B, N, C)`` to the same.

    Raises:
        ValueError: sizes below 1, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Han et al., "Transformer in Transformer", NeurIPS 2021, section 3.2.
    """

    def __init__(
        self,
        pixel_dim: int,
        dim: int,
        num_pixels: int = 16,
        pixel_heads: int = 4,
        num_heads: int = 6,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(num_pixels=num_pixels, pixel_dim=pixel_dim, pixel_heads=pixel_heads)
        if pixel_dim % pixel_heads:
            raise ValueError(
                f"pixel_dim must be a multiple of pixel_heads = {pixel_heads}, got {pixel_dim}"
            )
        check_heads(dim, num_heads)
        if not mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be > 0, got {mlp_ratio}")
        self.pixel_dim, self.dim, self.num_pixels = pixel_dim, dim, num_pixels
        factory = {"device": device, "dtype": dtype}
        self.norm_in = nn.LayerNorm(pixel_dim, **factory)
        self.attn_in = _Attention(pixel_dim, pixel_heads, qkv_bias, **factory)
        self.norm_mlp_in = nn.LayerNorm(pixel_dim, **factory)
        self.mlp_in = _MLP(pixel_dim, 4 * pixel_dim, **factory)
        self.norm1_proj = nn.LayerNorm(num_pixels * pixel_dim, **factory)
        self.proj = nn.Linear(num_pixels * pixel_dim, dim, bias=False, **factory)
        self.norm2_proj = nn.LayerNorm(dim, **factory)
        self.norm_out = nn.LayerNorm(dim, **factory)
        self.attn_out = _Attention(dim, num_heads, qkv_bias, **factory)
        self.norm_mlp = nn.LayerNorm(dim, **factory)
        self.mlp = _MLP(dim, int(dim * mlp_ratio), **factory)

    def forward(self, pixels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        check_tokens("patches", patches, self.dim)
        check_tokens("pixels", pixels, self.pixel_dim, self.num_pixels)
        B, N = patches.shape[:2]
        if N < 1 or len(pixels) != B * (N - 1):
            raise ValueError(
                f"pixels must be of B (N - 1) = {B * (N - 1)} patches, got {len(pixels)}"
            )
        pixels = pixels + self.attn_in(self.norm_in(pixels))
        pixels = pixels + self.mlp_in(self.norm_mlp_in(pixels))
        words = self.proj(
            self.norm1_proj(pixels.reshape(B, N - 1, self.num_pixels * self.pixel_dim))
        )
        words = self.norm2_proj(words)
        patches = torch.cat([patches[:, :1], patches[:, 1:] + words], 1)
        patches = patches + self.attn_out(self.norm_out(patches))
        return pixels, patches + self.mlp(self.norm_mlp(patches))

    def extra_repr(self) -> str:
        return f"pixel_dim={self.pixel_dim}, dim={self.dim}, num_pixels={self.num_pixels}"
