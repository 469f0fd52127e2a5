"""Branches of patches of different sizes that exchange their class tokens, as in CrossViT."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.nn.attention.heads import check_heads, check_tokens, merge_heads, split_heads
from weft.nn.checks import check_sizes
from weft.ops.attention.attention import attention


class ClassCrossAttention(nn.Module):
    r"""The first token attends to all: one query, O(N) work.

    .. math::
        \text{out} = W_o \, \mathrm{softmax}\Big(\frac{q K^T}{\sqrt{D}}\Big) V, \qquad
        q = W_q x_0, \; K = W_k x, \; V = W_v x

    per head, D = dim / num_heads.

    Args:
        dim: C.
        num_heads: divides dim.
        qkv_bias: whether queries, keys and values have a bias.
        device, dtype: of the parameters.

    Attributes:
        wq, wk, wv, proj: linear layers, by the names of the authors' code and of timm.

    Shapes: ``(B, N, C)``, N >= 1, to ``(B, 1, C)``.

    Raises:
        ValueError: sizes below 1, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image
    Classification", ICCV 2021, equation 4.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, qkv_bias: bool = False, device=None, dtype=None
    ):
        super().__init__()
        check_heads(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        factory = {"device": device, "dtype": dtype}
        self.wq = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.dim)
        if not x.shape[1]:
            raise ValueError("x must have at least one token, got none")
        query, key, value = self.wq(x[:, :1]), self.wk(x), self.wv(x)
        heads = (split_heads(t, self.num_heads) for t in (query, key, value))
        return self.proj(merge_heads(attention(*heads)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class ClassCrossAttentionBlock(nn.Module):
    r"""The residual block of :class:`ClassCrossAttention`: its input's class token, updated.

    .. math::
        y = x_0 + \mathrm{CA}(\mathrm{LN}(x))

    Args:
        dim, num_heads, qkv_bias, device, dtype: as of :class:`ClassCrossAttention`.

    Shapes: ``(B, N, C)``, N >= 1, to ``(B, 1, C)``.

    Raises:
        ValueError: sizes below 1, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image
    Classification", ICCV 2021, equation 5.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, qkv_bias: bool = False, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.attn = ClassCrossAttention(dim, num_heads, qkv_bias=qkv_bias, **factory)
        self.norm1 = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.attn.dim)
        return x[:, :1] + self.attn(self.norm1(x))


class CrossScaleFusion(nn.Module):
    r"""Each branch's class token looks at the patches of the next branch, and returns.

    .. math::
        y^a = \mathrm{block}\big([f(x_0^a), x_{1:}^b]\big), \qquad
        z^a = [g(y^a), x_{1:}^a], \qquad b = a + 1 \bmod n

    f and g are linear layers after a layer norm and a GELU, from the width of branch a to that of
    branch b and back. Patch tokens pass unchanged.

    Args:
        dims: the width of each branch; two in the paper.
        num_heads: of each branch; the attention over the patches of branch b has its heads.
        depth: how many blocks a class token passes. Only the first sees the patches, as in the
            authors' code: a block gives the class token alone.
        qkv_bias: whether queries, keys and values have a bias.
        device, dtype: of the parameters.

    Attributes:
        projs, fusion, revert_projs: f, the blocks and g. The names are those of timm's
            ``MultiScaleBlock``, whose state, without ``blocks``, this layer loads.

    Shapes: a sequence of ``(B, N_a, dims[a])``, the class token first; a list of the same out.

    Raises:
        ValueError: fewer than two branches, sizes below 1, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image
    Classification", ICCV 2021, equations 3 to 5 and figure 4.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_heads: Sequence[int],
        depth: int = 1,
        *,
        qkv_bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if len(dims) < 2 or len(dims) != len(num_heads):
            raise ValueError(
                f"dims and num_heads must be of two branches or more, got {dims}, {num_heads}"
            )
        check_sizes(depth=depth)
        for dim, heads in zip(dims, num_heads, strict=True):
            check_heads(dim, heads)
        self.dims = tuple(dims)
        factory = {"device": device, "dtype": dtype}

        def aligned(start: int, end: int) -> nn.Sequential:
            linear = nn.Linear(start, end, **factory)
            return nn.Sequential(nn.LayerNorm(start, **factory), nn.GELU(), linear)

        pairs = [(a, (a + 1) % len(dims)) for a in range(len(dims))]
        self.projs = nn.ModuleList(aligned(dims[a], dims[b]) for a, b in pairs)
        self.fusion = nn.ModuleList(
            nn.Sequential(
                *(
                    ClassCrossAttentionBlock(dims[b], num_heads[b], qkv_bias=qkv_bias, **factory)
                    for _ in range(depth)
                )
            )
            for _, b in pairs
        )
        self.revert_projs = nn.ModuleList(aligned(dims[b], dims[a]) for a, b in pairs)

    def forward(self, branches: Sequence[Tensor]) -> list[Tensor]:
        if len(branches) != len(self.dims):
            raise ValueError(f"branches must be {len(self.dims)} tensors, got {len(branches)}")
        for a, (x, dim) in enumerate(zip(branches, self.dims, strict=True)):
            check_tokens(f"branches[{a}]", x, dim)
        outputs = []
        for a, x in enumerate(branches):
            patches = branches[(a + 1) % len(branches)][:, 1:]
            token = self.projs[a](x[:, :1])
            token = self.fusion[a](torch.cat([token, patches], 1))
            token = self.revert_projs[a](token)
            outputs.append(torch.cat([token, x[:, 1:]], 1))
        return outputs
