"""Attention whose queries, keys and values are projected by depthwise convolutions, as in CvT."""

import torch
from torch import Tensor, nn

from weft.nn.attention.heads import check_heads, check_tokens, merge_heads, split_heads
from weft.nn.checks import check_sizes
from weft.ops.attention.attention import attention


class ConvProjectionAttention(nn.Module):
    r"""Self-attention of a map whose projections look at k x k places, keys and values at a stride.

    .. math::
        \text{out} = W_o \, \mathrm{softmax}\Big(\frac{Q K^T}{\sqrt{C}}\Big) V, \qquad
        Q, K, V = W_{q,k,v} \, \mathrm{BN}(\mathrm{DWConv}_{q,k,v}(x))

    With a stride of 2 there are a quarter as many keys as queries. The scale is that of the whole
    width C, not of a head, as in the authors' code and transformers. A class token takes no part
    in the convolutions: only :math:`W_{q,k,v}` see it.

    Args:
        dim: C.
        num_heads: divides dim.
        kernel: of the convolutions, odd.
        stride, query_stride: of the keys and values, and of the queries.
        class_token: whether a token precedes those of the map.
        qkv_bias: whether :math:`W_{q,k,v}` have a bias; the convolutions have none.
        device, dtype: of the parameters.

    Attributes:
        conv_proj_q, conv_proj_k, conv_proj_v: each of ``conv`` and ``bn``; proj_q, proj_k, proj_v,
            proj: linear layers. The names are those of the authors' code.

    Shapes: ``(B, H W, C)``, the map row by row, one more with a class token, and H, W;
    ``(B, ceil(H / query_stride) ceil(W / query_stride), C)`` out, one more with a class token.

    Raises:
        ValueError: sizes below 1, an even kernel, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021,
    equation 2 and section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel: int = 3,
        stride: int = 2,
        *,
        query_stride: int = 1,
        class_token: bool = False,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_sizes(kernel=kernel, stride=stride, query_stride=query_stride)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.dim, self.num_heads, self.kernel = dim, num_heads, kernel
        self.stride, self.query_stride, self.class_token = stride, query_stride, class_token
        factory = {"device": device, "dtype": dtype}

        def projection(step: int) -> nn.Sequential:
            conv = nn.Conv2d(dim, dim, kernel, step, kernel // 2, groups=dim, bias=False, **factory)
            parts = nn.Sequential()
            parts.add_module("conv", conv)
            parts.add_module("bn", nn.BatchNorm2d(dim, **factory))
            return parts

        self.conv_proj_q = projection(query_stride)
        self.conv_proj_k = projection(stride)
        self.conv_proj_v = projection(stride)
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.proj_k = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.proj_v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        check_sizes(height=height, width=width)
        first = int(self.class_token)
        check_tokens("x", x, self.dim, height * width + first)
        places = x[:, first:].mT.unflatten(2, (height, width))

        def project(convolution: nn.Sequential, linear: nn.Linear) -> Tensor:
            tokens = convolution(places).flatten(2).mT
            if self.class_token:
                tokens = torch.cat([x[:, :1], tokens], 1)
            return split_heads(linear(tokens), self.num_heads)

        query = project(self.conv_proj_q, self.proj_q)
        key = project(self.conv_proj_k, self.proj_k)
        value = project(self.conv_proj_v, self.proj_v)
        return self.proj(merge_heads(attention(query, key, value, scale=self.dim**-0.5)))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, stride={self.stride}, "
            f"query_stride={self.query_stride}, class_token={self.class_token}"
        )
