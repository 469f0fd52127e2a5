"""Pruning of tokens by a score, and blocks whose class token gives that score."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from weft.nn.attention.heads import check_heads, check_tokens, merge_heads, split_heads
from weft.nn.attention.packed_tokens import PackedTokens
from weft.nn.checks import check_features
from weft.ops.attention.attention import attention
from weft.ops.attention.varlen import attention_varlen


def prune_tokens(
    x: Tensor, scores: Tensor, keep: int, *, fuse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""The tokens of the highest scores, and where asked all others as one token.

    .. math::
        \text{out} = [x_{\pi(1)}, \dots, x_{\pi(k)}, \sum_{i > k} a_{\pi(i)} x_{\pi(i)}],
        \qquad a_{\pi(1)} \ge \dots \ge a_{\pi(N)}

    The weights of the fused token are the scores as they are, not normalized: where the scores are
    what a class token pays, it is as small as they say. Of equal scores the first come first.

    Args:
        x: ``(B, N, D)``.
        scores: ``(B, N)``, a; through them the fused token has a gradient.
        keep: k, from 1 to N. With k = N there is nothing to fuse.
        fuse: append the fused token.

    Returns:
        Tokens ``(B, k, D)``, or ``(B, k + 1, D)`` with a fused one; indices ``(B, k)`` int64 of
        those kept, by falling score. For k = N, x itself and its indices in their order.

    Raises:
        ValueError: shapes, or a k out of range.
        TypeError: tensors that are not floating-point, a k that is no integer.

    Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
    Token Reorganizations", ICLR 2022, section 3.2, equation 4.
    """
    check_features("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must be (B, N, D), got {tuple(x.shape)}")
    check_features("scores", scores)
    B, N, D = x.shape
    if scores.shape != (B, N):
        raise ValueError(f"scores must be {(B, N)}, got {tuple(scores.shape)}")
    if not isinstance(keep, (int, torch.SymInt)) or isinstance(keep, bool):
        raise TypeError(f"keep must be an integer, got {keep!r}")
    if not 1 <= keep <= N:
        raise ValueError(f"keep must be from 1 to {N}, got {keep}")
    if keep == N:
        return x, torch.arange(N, device=x.device).expand(B, N)
    kept = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
    tokens = x.gather(1, kept[..., None].expand(B, keep, D))
    if not fuse:
        return tokens, kept
    rest = scores.scatter(1, kept, 0)
    return torch.cat([tokens, (rest[:, None].to(x.dtype) @ x).to(x.dtype)], 1), kept


class TokenPruning(nn.Module):
    r""":func:`prune_tokens` behind leading tokens that always stay.

    Args:
        keep: how many of the other tokens stay: a rate in (0, 1], of which
            :math:`\lceil \text{keep} \cdot N \rceil` tokens result, or an integer >= 1. An integer
            that is more than there are keeps all of them.
        fuse: append the fused token.
        leading: number of tokens (class, distillation) that come first and stay.

    Shapes: x ``(B, leading + N, D)`` and scores ``(B, N)`` give tokens
    ``(B, leading + k [+ 1], D)`` and indices ``(B, k)`` of those kept, counted behind the leading
    tokens.

    Raises:
        ValueError: a rate or number out of range, shapes that do not match.
        TypeError: tensors that are not floating-point.

    Source: as :func:`prune_tokens`.
    """

    def __init__(self, keep: float | int, *, fuse: bool = True, leading: int = 1):
        super().__init__()
        if isinstance(keep, bool) or not (keep >= 1 if isinstance(keep, int) else 0 < keep <= 1):
            raise ValueError(f"keep must be a rate in (0, 1] or an integer >= 1, got {keep!r}")
        if not isinstance(leading, int) or leading < 0:
            raise ValueError(f"leading must be an integer >= 0, got {leading!r}")
        self.keep, self.fuse, self.leading = keep, fuse, leading

    def count(self, N: int) -> int:
        """How many of N tokens stay."""
        return min(self.keep, N) if isinstance(self.keep, int) else math.ceil(self.keep * N)

    def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        check_features("x", x)
        if x.dim() != 3 or x.shape[1] <= self.leading:
            raise ValueError(
                f"x must be (B, N, D) with more than {self.leading} tokens, got {tuple(x.shape)}"
            )
        first, others = x.tensor_split([self.leading], 1)
        count = self.count(others.shape[1])
        tokens, kept = prune_tokens(others, scores, count, fuse=self.fuse)
        return torch.cat([first, tokens], 1), kept

    def extra_repr(self) -> str:
        return f"keep={self.keep}, fuse={self.fuse}, leading={self.leading}"


class ClassAttention(nn.Module):
    r"""Self-attention that also tells how much the class token pays to each other token.

    .. math::
        a_i = \frac1H \sum_h P_{h, 0, i}, \qquad P_h = \mathrm{softmax}(Q_h K_h^\top / \sqrt d),
        \qquad i = 1, \dots, N

    The row of the class token comes out of the op as its key sums with a one-hot query weight: the
    matrices of the heads are never stored.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        qkv_bias: whether query, key and value have a bias.
        device, dtype: of the parameters.

    Attributes:
        qkv, proj: the linear layers, named as in timm's vision transformer.

    Shapes: x ``(B, 1 + N, C)``, the class token first; the result is ``(B, 1 + N, C)`` and the
    attentiveness ``(B, N)``, in float32 or wider, with gradient. :meth:`packed` takes samples that
    keep different numbers of tokens, see :func:`weft.nn.pack_tokens`.

    Raises:
        ValueError: sizes, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
    Token Reorganizations", ICLR 2022, equations 2 and 3.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, qkv_bias: bool = True, device=None, dtype=None
    ):
        super().__init__()
        check_heads(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_tokens("x", x, self.dim)
        query, key, value = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        first = torch.zeros(x.shape[0], 1, x.shape[1], dtype=query.dtype, device=x.device)
        first[..., :1] = 1
        out, paid = attention(query, key, value, return_key_sums=True, query_weight=first)
        return self.proj(merge_heads(out)), paid.mean(1)[:, 1:]

    def packed(self, x: PackedTokens) -> tuple[PackedTokens, Tensor]:
        """The same for samples of different lengths, the class token first in each. The
        attentiveness is ``(T,)``, of every token, that of the class token to itself included."""
        check_features("x.tokens", x.tokens, self.dim)
        parts = self.qkv(x.tokens).chunk(3, -1)
        heads = (t.unflatten(-1, (self.num_heads, -1)) for t in parts)
        first = torch.zeros(1, len(x.tokens), dtype=parts[0].dtype, device=x.tokens.device)
        lengths = x.offsets.diff()
        first[0, x.offsets[:-1][lengths > 0]] = 1
        sizes = (x.offsets, x.offsets, x.max_length, x.max_length)
        out, paid = attention_varlen(*heads, *sizes, return_key_sums=True, query_weight=first)
        return x.with_tokens(self.proj(out.flatten(1))), paid.mean(0)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class EViTBlock(nn.Module):
    r"""A pre-norm transformer block that drops the patches to which the class token pays least.

    .. math::
        y, a = \text{attention}(\text{LN}(x)), \quad z = x + y, \quad
        z' = [z_0, z_{\pi(1)}, \dots, z_{\pi(k)}, \sum_{i > k} a_{\pi(i)} z_{\pi(i)}], \quad
        \text{out} = z' + \text{MLP}(\text{LN}(z'))

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        keep: rate or number of patches that stay, see :class:`TokenPruning`; 1.0 is a plain block.
        fuse: whether the others become one token.
        mlp_ratio: hidden width of the MLP in units of C.
        qkv_bias: whether query, key and value have a bias.
        device, dtype: of the parameters.

    Attributes:
        norm1, attn, norm2, mlp: named as in timm's vision transformer, whose weights load.

    Shapes: x ``(B, 1 + N, C)``, the class token first; the result is ``(B, 1 + k [+ 1], C)`` and
    the indices ``(B, k)`` of the patches that stay, by falling attentiveness. A fused token is a
    patch like others in the next block.

    Raises:
        ValueError: sizes, a rate out of range, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
    Token Reorganizations", ICLR 2022, section 3; the order of steps is that of the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        keep: float | int = 0.7,
        *,
        fuse: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.attn = ClassAttention(dim, num_heads, qkv_bias=qkv_bias, **factory)
        self.pruning = TokenPruning(keep, fuse=fuse)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, **factory) for _ in range(2))
        hidden = int(dim * mlp_ratio)
        layers = OrderedDict(
            fc1=nn.Linear(dim, hidden, **factory),
            act=nn.GELU(),
            fc2=nn.Linear(hidden, dim, **factory),
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_tokens("x", x, self.attn.dim)
        y, attentiveness = self.attn(self.norm1(x))
        x, kept = self.pruning(x + y, attentiveness)
        return x + self.mlp(self.norm2(x)), kept
