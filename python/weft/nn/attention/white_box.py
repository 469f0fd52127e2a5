"""The blocks of white-box transformers: compression by subspaces, then sparse coding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.attention.heads import check_tokens, merge_heads, split_heads
from weft.nn.checks import check_sizes
from weft.ops.attention.attention import attention


class SubspaceAttention(nn.Module):
    r"""Multi-head subspace self-attention: one projection is query, key and value of a head.

    .. math::
        \text{MSSA}(Z) = [A_1, \dots, A_H] \, W_O, \qquad
        A_h = \mathrm{softmax}\big((Z U_h)(Z U_h)^\top / \sqrt p\big) \, Z U_h

    with a learned basis :math:`U_h` of p columns for each head.

    Args:
        dim: C.
        num_heads: number of subspaces.
        head_dim: p, their dimension; default C // num_heads.
        device, dtype: of the parameters.

    Attributes:
        qkv, to_out: the bases and the linear layer behind, named as in the authors' code.

    Shapes: ``(B, N, C)`` to the same.

    Raises:
        ValueError: sizes, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Pai et al., "Masked Completion via Structured Diffusion with White-Box Transformers",
    ICLR 2024, section 2, with the scale and the output layer of the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads)
        head_dim = max(dim // num_heads, 1) if head_dim is None else head_dim
        check_sizes(head_dim=head_dim)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        inner = num_heads * head_dim
        self.qkv = nn.Linear(dim, inner, bias=False, device=device, dtype=dtype)
        self.to_out = nn.Sequential(nn.Linear(inner, dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.dim)
        z = split_heads(self.qkv(x), self.num_heads)
        return self.to_out(merge_heads(attention(z, z, z)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class CRATEBlock(nn.Module):
    r"""A layer of CRATE: a step of compression, then a step of sparse coding.

    .. math::
        Y = Z + \text{MSSA}(\text{LN}(Z)), \quad X = \text{LN}(Y), \quad
        \text{out} = \mathrm{ReLU}\big(X + \eta \, D^\top (X - D X) - \eta \lambda\big)

    The second is one proximal gradient step (ISTA) towards the sparse non-negative code of X in
    the learned dictionary D; nothing bypasses it.

    Args:
        dim: C.
        num_heads, head_dim: of :class:`SubspaceAttention`.
        step_size: eta > 0.
        sparsity: lambda >= 0; 0.5 in the authors' autoencoder, 0.1 in their classifier.
        device, dtype: of the parameters.

    Attributes:
        norm1, attention, norm2: the first step, and the norm between.
        dictionary: ``(C, C)``, D.

    Shapes: ``(B, N, C)`` to the same.

    Raises:
        ValueError: sizes and numbers out of range, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Pai et al., "Masked Completion via Structured Diffusion with White-Box Transformers",
    ICLR 2024, section 2 (the encoder), as in the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        step_size: float = 0.1,
        sparsity: float = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not step_size > 0:
            raise ValueError(f"step_size must be > 0, got {step_size}")
        if not sparsity >= 0:
            raise ValueError(f"sparsity must be >= 0, got {sparsity}")
        factory = {"device": device, "dtype": dtype}
        self.attention = SubspaceAttention(dim, num_heads, head_dim, **factory)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, **factory) for _ in range(2))
        self.dictionary = nn.Parameter(torch.empty(dim, dim, **factory))
        nn.init.kaiming_uniform_(self.dictionary)
        self.step_size, self.sparsity = float(step_size), float(sparsity)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.attention.dim)
        x = self.norm2(x + self.attention(self.norm1(x)))
        missing = x - F.linear(x, self.dictionary)
        step = F.linear(missing, self.dictionary.mT) - self.sparsity
        return F.relu(x + self.step_size * step)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size}, sparsity={self.sparsity}"


class CRATEDecoderBlock(nn.Module):
    r"""A layer of CRATE's decoder: the encoder's two steps undone in reverse order.

    .. math::
        Y = \text{LN}(Z) \, E^\top, \qquad \text{out} = Y - \text{MSSA}(\text{LN}(Y))

    Args:
        dim: C.
        num_heads, head_dim: of :class:`SubspaceAttention`.
        device, dtype: of the parameters.

    Attributes:
        dictionary: ``(C, C)``, E.
        norm1, norm2, attention: as in the formula.

    Shapes: ``(B, N, C)`` to the same.

    Raises:
        ValueError: sizes, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Pai et al., "Masked Completion via Structured Diffusion with White-Box Transformers",
    ICLR 2024, section 2 (the decoder), as in the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.attention = SubspaceAttention(dim, num_heads, head_dim, **factory)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, **factory) for _ in range(2))
        self.dictionary = nn.Parameter(torch.empty(dim, dim, **factory))
        nn.init.kaiming_uniform_(self.dictionary)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.attention.dim)
        x = F.linear(self.norm1(x), self.dictionary)
        return x - self.attention(self.norm2(x))
