"""Self-attention of patches whose scores are multiplied by a learned mixture of Gaussians."""

import torch
from torch import Tensor, nn

from weft.nn.attention.heads import (
    check_tokens,
    grid_offsets,
    merge_heads,
    size_pair,
    split_heads,
)
from weft.nn.checks import check_sizes


class GaussianMixtureMask(nn.Module):
    r"""A mask over pairs of patches: a mixture of Gaussians of their distance in the grid.

    .. math::
        M_{hij} = \sum_k \alpha_{kh} \exp\!\Big(\!-\frac{d_{ij}^2}{2 (\sigma_{kh}^2 + 10^{-5})}\Big)

    with d in patches. The amplitudes may be of either sign.

    Args:
        grid_size: H and W of the grid of patches.
        num_heads: number of masks.
        num_gaussians: K.
        device, dtype: of the parameters.

    Attributes:
        sigma, alpha: ``(K, num_heads, 1, 1)``, drawn as in the authors' code:
            :math:`\sigma \sim N(10, 10^2)`, :math:`\alpha \sim N(0, 2^2)`.

    Shapes: no input; the mask is ``(num_heads, HW, HW)``, rows are queries.

    Raises:
        ValueError: sizes below 1.

    Source: Li and Zhang, "Toward a Deeper Understanding: RetNet Viewed through Convolution",
    2023, section 3, with the constants of the authors' code.
    """

    def __init__(
        self,
        grid_size: int | tuple[int, int],
        num_heads: int,
        num_gaussians: int = 3,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(num_heads=num_heads, num_gaussians=num_gaussians)
        self.grid_size = size_pair("grid_size", grid_size)
        self.num_heads, self.num_gaussians = num_heads, num_gaussians
        shape = (num_gaussians, num_heads, 1, 1)
        self.sigma = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New random widths and amplitudes."""
        self.sigma.normal_(10.0, 10.0)
        self.alpha.normal_(0.0, 2.0)

    def forward(self) -> Tensor:
        rows, columns = grid_offsets(*self.grid_size, device=self.sigma.device)
        height, width = (torch.arange(n, device=rows.device) for n in self.grid_size)
        square = (height.square()[:, None] + width.square()).to(self.sigma.dtype)
        gaussians = torch.exp(-square / (2 * (self.sigma.square() + 1e-5)))
        # HW distinct offsets: the K Gaussians of each are added before they become (HW)^2 pairs
        return (self.alpha * gaussians).sum(0)[:, rows.abs(), columns.abs()]

    def extra_repr(self) -> str:
        return (
            f"grid_size={self.grid_size}, num_heads={self.num_heads}, "
            f"num_gaussians={self.num_gaussians}"
        )


class GaussianMaskAttention(nn.Module):
    r"""Self-attention of patches with scores weighted by :class:`GaussianMixtureMask`.

    .. math::
        \text{out}_{hi} = \sum_j \mathrm{softmax}_j\!\Big(M_{hij} \,
            \frac{\langle q_{hi}, k_{hj} \rangle}{\sqrt{D}}\Big) \, v_{hj}

    followed by a linear layer. The mask multiplies the scores, before the softmax: no bias, mask
    or key weight of :func:`weft.attention` says this (a factor of the *weights* would be the bias
    :math:`\log M`), so the scores are held here: O(num_heads N²) memory.

    Args:
        dim: C, of the tokens.
        grid_size: H and W of the grid of patches; there is no class token.
        num_heads, head_dim: the inner width is their product.
        num_gaussians: K, of each head's mask.
        device, dtype: of the parameters.

    Shapes: ``(B, HW, C)`` to the same, patches row by row.

    Raises:
        ValueError: sizes below 1, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Li and Zhang, "Toward a Deeper Understanding: RetNet Viewed through Convolution",
    2023, section 3; the layer of the authors' vision transformer, with the names of its
    parameters.
    """

    def __init__(
        self,
        dim: int,
        grid_size: int | tuple[int, int],
        num_heads: int = 8,
        head_dim: int = 64,
        num_gaussians: int = 3,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(dim=dim, head_dim=head_dim)
        factory = {"device": device, "dtype": dtype}
        self.mask = GaussianMixtureMask(grid_size, num_heads, num_gaussians, **factory)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.to_qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=False, **factory)
        self.to_out = nn.Sequential(nn.Linear(num_heads * head_dim, dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.mask.grid_size
        check_tokens("x", x, self.dim, height * width)
        query, key, value = (split_heads(t, self.num_heads) for t in self.to_qkv(x).chunk(3, -1))
        scores = self.mask() * (query @ key.mT) * self.head_dim**-0.5
        return self.to_out(merge_heads(scores.softmax(-1).to(value.dtype) @ value))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"
