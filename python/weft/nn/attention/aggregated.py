"""Attention to the near places of a map and to a pooled copy of all of it, as in TransNeXt."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.attention.heads import (
    check_heads,
    check_tokens,
    merge_heads,
    size_pair,
    split_heads,
)
from weft.nn.checks import check_sizes
from weft.ops.attention.attention import attention
from weft.ops.attention.biases import RelativeBias

FIRST_TEMPERATURE = math.log(math.expm1(1 / 0.24))  # its softplus is 1 / 0.24


def relative_coordinates(
    size: tuple[int, int], key_size: tuple[int, int], pretrain_size: tuple[int, int], device=None
) -> tuple[Tensor, Tensor]:
    r"""The distinct offsets of the places of a map from those of its pooled copy.

    Returns ``(offsets, 2)`` log-spaced coordinates, :math:`\mathrm{sign}(u) \log_8(1 + |u|)` of
    offsets u that run from -8 to 8 over the map of pretraining, and ``(N, P)`` int64: which of
    them belongs to a query and a key.
    """
    (rows, row), (columns, column) = (
        _axis_coordinates(*sizes, device)
        for sizes in zip(size, key_size, pretrain_size, strict=True)
    )
    coordinates = torch.cartesian_prod(rows, columns)
    index = row[:, None, :, None] * len(columns) + column[None, :, None, :]
    return coordinates, index.reshape(size[0] * size[1], -1)


def _axis_coordinates(size: int, cells: int, pretrained: int, device) -> tuple[Tensor, Tensor]:
    """Of one axis: the coordinates ``(offsets,)`` and their index ``(size, cells)``. A cell lies at
    the mean of its places, so that twice an offset is an integer."""
    starts = [cell * size // cells for cell in range(cells)]
    ends = [-(-(cell + 1) * size // cells) for cell in range(cells)]
    centers = [start + end - 1 for start, end in zip(starts, ends, strict=True)]
    doubled = [[2 * place - center for center in centers] for place in range(size)]
    distinct = sorted({offset for row in doubled for offset in row})
    order = {offset: n for n, offset in enumerate(distinct)}
    index = torch.tensor([[order[offset] for offset in row] for row in doubled], device=device)
    u = torch.tensor(distinct, dtype=torch.float64, device=device) * 4 / max(pretrained - 1, 1)
    return u.sign() * (1 + u.abs()).log2() / 3, index


class _CosineAttention(nn.Module):
    """What both attentions of TransNeXt share: scaled unit queries, and a bias by an MLP."""

    def __init__(
        self,
        dim: int,
        input_size: int | tuple[int, int],
        num_heads: int,
        pool: int,
        pretrain_size: int | tuple[int, int] | None,
        factory: dict,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_sizes(pool=pool)
        self.input_size = size_pair("input_size", input_size)
        pretrained = size_pair("pretrain_size", pretrain_size or self.input_size)
        self.pool_size = tuple(n // pool for n in self.input_size)
        if 0 in self.pool_size:
            raise ValueError(f"pool must be at most {min(self.input_size)}, got {pool}")
        self.dim, self.num_heads = dim, num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        embedding = torch.empty(num_heads, 1, dim // num_heads, **factory)
        self.query_embedding = nn.Parameter(embedding)
        self.proj = nn.Linear(dim, dim, **factory)
        self.cpb_fc1 = nn.Linear(2, 512, **factory)
        self.cpb_fc2 = nn.Linear(512, num_heads, **factory)
        sizes = (self.input_size, self.pool_size, pretrained)
        coordinates, index = relative_coordinates(*sizes, factory["device"])
        coordinates = coordinates.to(self.temperature.dtype)
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.register_buffer("coordinate_index", index, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The beginnings of the authors' code; its linear layers reset themselves."""
        self.temperature.fill_(FIRST_TEMPERATURE)
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def _scaled(self, unit: Tensor, log_keys: Tensor | float) -> Tensor:
        return (unit + self.query_embedding) * (F.softplus(self.temperature) * log_keys)

    def _bias(self) -> RelativeBias:
        table = self.cpb_fc2(F.relu(self.cpb_fc1(self.coordinates)))
        return RelativeBias(table, self.coordinate_index)


class LengthScaledCosineAttention(_CosineAttention):
    r"""Self-attention by cosines, sharper the more keys there are.

    .. math::
        \text{out}_i = W_o \sum_j \mathrm{softmax}_j\big(
            \tau \log(N) \, \langle \hat q_i + e, \hat k_j \rangle + b_{ij}\big) \, v_j

    per head, N = H W: the entropy of the weights stays about the same from one size of map to
    another. Hats divide by the norm, :math:`\tau = \mathrm{softplus}(\texttt{temperature})`, e is
    the query embedding and b an MLP of log-spaced offsets. It is TransNeXt's attention where a map
    is so small that all its places are near.

    Args:
        dim: C.
        input_size: H and W of the map.
        num_heads: divides dim.
        qkv_bias: whether queries, keys and values have a bias.
        pretrain_size: the H and W that offsets are measured by, where a layer is fine-tuned on
            larger maps than it was pretrained on; default: input_size.
        device, dtype: of the parameters.

    Attributes:
        temperature, query_embedding, qkv, proj, cpb_fc1, cpb_fc2: by the names of the authors'
            code.

    Shapes: ``(B, H W, C)``, the map row by row, to the same.

    Raises:
        ValueError: sizes below 1, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024,
    section 3, length-scaled cosine attention.
    """

    def __init__(
        self,
        dim: int,
        input_size: int | tuple[int, int],
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        pretrain_size: int | tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, input_size, num_heads, 1, pretrain_size, factory)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        places = self.input_size[0] * self.input_size[1]
        check_tokens("x", x, self.dim, places)
        query, key, value = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        query = self._scaled(F.normalize(query, dim=-1), math.log(places)).to(value.dtype)
        key = F.normalize(key, dim=-1).to(value.dtype)
        out = attention(query, key, value, bias=self._bias(), scale=1.0)
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, input_size={self.input_size}, num_heads={self.num_heads}"


class AggregatedAttention(_CosineAttention):
    r"""One softmax over a k x k window around each place and over a pooled copy of the map.

    .. math::
        s_{ij} &= \tau \log(n_i) \, \langle \hat q_i + e, \hat k_j \rangle + b_{ij}, \qquad
        P_i = \mathrm{softmax}(s_i) \text{ over } w(i) \cup \text{pooled} \\
        \text{out}_i &= W_o \Big(\sum_j P_{ij} v_j + \sum_{j \in w(i)}
            \big(\langle \hat q_i, t_{j - i} \rangle + c_{j - i}\big) \, v_j\Big)

    per head. w(i) is the window cut at the border of the map, :math:`n_i` the number of keys that
    place i sees, hats divide by the norm, :math:`\tau = \mathrm{softplus}(\texttt{temperature})`;
    e is the query embedding, t and c the learnable tokens and their bias, and b a table by offset
    for the window and an MLP of log-spaced offsets for the pooled places. The pooled map is
    :math:`\mathrm{LN}(\mathrm{AvgPool}(\mathrm{GELU}(W_s x)))`, with the keys' and values'
    projections of the map itself. :func:`weft.attention` over the pooled places gives their sum
    and its log-sum-exp, which joins the k² scores of the window as one more key whose value is
    that sum: exactly the softmax over both, in O(N (k² + D)) memory.

    Args:
        dim: C.
        input_size: H and W of the map.
        num_heads: divides dim.
        window: k, odd.
        pool: by how much a pooled side is shorter than the map's: the pooled map is
            H // pool x W // pool.
        qkv_bias: whether queries, keys and values have a bias.
        pretrain_size: the H and W that offsets are measured by, where a layer is fine-tuned on
            larger maps than it was pretrained on; default: input_size.
        device, dtype: of the parameters.

    Attributes:
        temperature, query_embedding, learnable_tokens, learnable_bias, relative_pos_bias_local, q,
            kv, proj, sr, norm, cpb_fc1, cpb_fc2: by the names of the authors' code.

    Shapes: ``(B, H W, C)``, the map row by row, to the same.

    Raises:
        ValueError: sizes below 1, an even window, a pooled map without places, tokens of another
            shape.
        TypeError: tokens that are not floating-point.

    Source: Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024,
    section 3 (pixel-focused and aggregated attention, length-scaled cosine attention).
    """

    def __init__(
        self,
        dim: int,
        input_size: int | tuple[int, int],
        num_heads: int = 8,
        window: int = 3,
        pool: int = 8,
        *,
        qkv_bias: bool = True,
        pretrain_size: int | tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, input_size, num_heads, pool, pretrain_size, factory)
        check_sizes(window=window)
        if window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        self.window, head_dim = window, dim // num_heads
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, head_dim, window**2, **factory))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, window**2, **factory))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, window**2, **factory))
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.sr = nn.Conv2d(dim, dim, 1, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        (height, width), (pool_height, pool_width) = self.input_size, self.pool_size
        places = torch.ones(1, 1, height * width, 1, device=device)
        inside = torch.stack([t.flatten() for t in self._near(places)], -1) > 0
        log_keys = (inside.sum(1, keepdim=True) + pool_height * pool_width).double().log()
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("log_keys", log_keys.to(self.temperature.dtype), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The beginnings of the authors' code; its linear layers reset themselves."""
        super().reset_parameters()
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.input_size
        check_tokens("x", x, self.dim, H * W)
        unit = F.normalize(split_heads(self.q(x), self.num_heads), dim=-1)
        query = self._scaled(unit, self.log_keys)
        pooled = F.gelu(self.sr(x.mT.unflatten(2, (H, W))))
        pooled = F.adaptive_avg_pool2d(pooled, self.pool_size).flatten(2).mT
        kv = torch.cat([self.kv(x), self.kv(self.norm(pooled))], 1)
        key, value = (split_heads(part, self.num_heads) for part in kv.chunk(2, -1))
        key = F.normalize(key, dim=-1)
        N = H * W
        peripheral, lse = attention(
            query.to(value.dtype),
            key[:, :, N:].to(value.dtype),
            value[:, :, N:],
            bias=self._bias(),
            scale=1.0,
            return_lse=True,
        )
        places = query.unflatten(2, (H, W))
        near = torch.stack([(places * k).sum(-1) for k in self._near(key[:, :, :N])], -1)
        near = near.flatten(2, 3) + self.relative_pos_bias_local[:, None]
        scores = torch.cat([near.masked_fill(~self.inside, float("-inf")), lse[..., None]], -1)
        weights, rest = scores.softmax(-1).split([self.window**2, 1], -1)
        weights = weights + unit @ self.learnable_tokens + self.learnable_bias
        out = (rest * peripheral).unflatten(2, (H, W))
        values = self._near(value[:, :, :N])
        for weight, v in zip(weights.unflatten(2, (H, W)).unbind(-1), values, strict=True):
            out = out + weight[..., None] * v
        return self.proj(merge_heads(out.flatten(2, 3).to(value.dtype)))

    def _near(self, x: Tensor) -> list[Tensor]:
        """``(B, heads, N, D)``: at each place of the window, what the places of the map find there,
        ``(B, heads, H, W, D)``; 0 beyond the map. Views of one padded copy."""
        (height, width), radius = self.input_size, self.window // 2
        padded = F.pad(x.unflatten(2, (height, width)), (0, 0, *4 * (radius,)))
        return [
            padded[:, :, row : row + height, column : column + width]
            for row in range(self.window)
            for column in range(self.window)
        ]

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, input_size={self.input_size}, num_heads={self.num_heads}, "
            f"window={self.window}, pool_size={self.pool_size}"
        )
