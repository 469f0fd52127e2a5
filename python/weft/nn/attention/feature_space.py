"""Attention among tokens that look alike, in clusters of equal size, as in BOAT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.attention.heads import check_grid, check_heads, merge_heads, split_heads
from weft.nn.checks import at_least_float32, check_features, check_sizes, full_precision
from weft.ops.attention.attention import attention


@torch.no_grad()
def balanced_clusters(x: Tensor, levels: int, steps: int = 2) -> Tensor:
    r"""Sorts tokens into 2^levels clusters of equal size by repeated bisection.

    One bisection of the m tokens of a node begins with the directions of the means of their first
    and second half, :math:`c_1, c_2`, and improves them ``steps`` times:

    .. math::
        a_{ik} = \mathrm{softmax}_k(100 \cos(x_i, c_k)), \qquad
        c_k \leftarrow \frac{\sum_i a_{ik} x_i}{\lVert \sum_i a_{ik} x_i \rVert}

    Tokens are then sorted by :math:`(1 + \cos(x_i, c_1)) / (1 + \cos(x_i, c_2))`, ascending; the
    lower half is one child, the upper half the other. No gradient passes.

    Args:
        x: ``(..., N, D)``, N a multiple of 2^levels; computed in float32 or wider.
        levels: number of bisections that each token takes part in, >= 0.
        steps: improvements of each pair of centroids, >= 0.

    Returns:
        ``(..., N)`` int64, a permutation: token ``order[n]`` is in cluster ``n // (N / 2^levels)``.
        Of two sibling clusters, the nearest to each other are the end of the first and the start
        of the second.

    Raises:
        ValueError: levels or steps below 0, an N that cannot be halved so often.
        TypeError: x that is not floating-point.

    Source: Yu et al., "BOAT: Bilateral Local Attention Vision Transformer", BMVC 2022,
    balanced hierarchical clustering, with the constants of the public implementation.
    """
    check_features("x", x)
    for name, number in (("levels", levels), ("steps", steps)):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {number!r}")
    if x.dim() < 2 or x.shape[-2] % 2**levels:
        raise ValueError(
            f"x must be (..., N, D) with N a multiple of {2**levels}, got {tuple(x.shape)}"
        )
    *batch, N, D = x.shape
    x = at_least_float32(x).reshape(-1, N, D)
    order = torch.arange(N, device=x.device).expand(len(x), N)
    for _ in range(levels):
        ranks, half = _bisection(x, steps), x.shape[1] // 2
        order = order.gather(1, ranks).unflatten(1, (2, half)).flatten(0, 1)
        x = x.gather(1, ranks[..., None].expand_as(x)).unflatten(1, (2, half)).flatten(0, 1)
    return order.reshape(*batch, N)


def _bisection(x: Tensor, steps: int) -> Tensor:
    """``(nodes, m, D)`` -> ``(nodes, m)``: each node's tokens from one centroid to the other."""
    with full_precision(x):
        unit = F.normalize(x, dim=-1)
        centroids = F.normalize(x.unflatten(1, (2, -1)).mean(2), dim=-1)
        for _ in range(steps):
            assigned = (100 * (unit @ centroids.mT)).softmax(-1)
            centroids = F.normalize(assigned.mT @ x, dim=-1)
        cosines = unit @ centroids.mT
        ratio = (1 + cosines[..., 0]) / (1 + cosines[..., 1])
    return ratio.argsort(dim=-1, stable=True)


class FeatureSpaceAttention(nn.Module):
    r"""Self-attention within clusters of tokens whose queries look alike.

    Each head sorts the tokens by its own queries into :math:`2^L` clusters of m tokens
    (:func:`balanced_clusters`), with L the largest that leaves m >= cluster_size. Token i of
    cluster c then attends to the tokens of c and to those ``overlap`` tokens of the sibling
    cluster that lie next to it in the order of the last bisection:

    .. math::
        \text{out}_i = W_o \Big(\sum_{j \in c \cup o(c)}
            \mathrm{softmax}_j\Big(\frac{\langle q_i, k_j \rangle}{\sqrt{D}}\Big) \, v_j
            + \mathrm{DWConv}(v)_i\Big)

    The convolution, 3 x 3 over the map, is the only part that knows places.

    Args:
        dim: C, of the map.
        num_heads: divides dim.
        cluster_size: what m is at least, unless the map has fewer places.
        overlap: from 0 to cluster_size.
        qkv_bias: whether queries, keys and values have a bias.
        device, dtype: of the parameters.

    Attributes:
        qkv, proj, get_v: linear layers and the convolution, by the names of the public code.

    Shapes: ``(B, H, W, C)`` to the same, H W a multiple of :math:`2^L`.

    Raises:
        ValueError: sizes out of range, a map of another width or of a number of places that cannot
            be halved L times.
        TypeError: features that are not floating-point.

    Source: Yu et al., "BOAT: Bilateral Local Attention Vision Transformer", BMVC 2022,
    feature-space local attention; overlap, convolution and constants as in the public
    implementation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cluster_size: int = 49,
        overlap: int = 20,
        *,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_sizes(cluster_size=cluster_size)
        if not isinstance(overlap, int) or not 0 <= overlap <= cluster_size:
            raise ValueError(f"overlap must be from 0 to {cluster_size}, got {overlap!r}")
        self.dim, self.num_heads = dim, num_heads
        self.cluster_size, self.overlap = cluster_size, overlap
        factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        check_grid("x", x, self.dim)
        B, H, W, _ = x.shape
        levels = max((H * W // self.cluster_size).bit_length() - 1, 0)
        if (H * W) % 2**levels:
            raise ValueError(f"x must have a multiple of {2**levels} places, got {H} x {W}")
        parts = self.qkv(x.flatten(1, 2)).chunk(3, -1)
        local = self.get_v(parts[2].mT.unflatten(2, (H, W))).flatten(2).mT
        query, key, value = (split_heads(part, self.num_heads) for part in parts)
        order = balanced_clusters(query.detach(), levels)

        def clusters(t: Tensor) -> Tensor:  # (B heads clusters, 1, m, D)
            t = t.gather(2, order[..., None].expand_as(t))
            return t.unflatten(2, (2**levels, H * W // 2**levels)).flatten(0, 2)[:, None]

        query, key, value = clusters(query), clusters(key), clusters(value)
        if levels:
            key, value = self._with_siblings(key), self._with_siblings(value)
        out = attention(query, key, value).reshape(B, self.num_heads, H * W, query.shape[-1])
        back = order.argsort(-1)
        out = merge_heads(out.gather(2, back[..., None].expand_as(out)))
        return self.proj(out + local).unflatten(1, (H, W))

    def _with_siblings(self, t: Tensor) -> Tensor:
        first, second = t[::2], t[1::2]
        start, end = second[:, :, : self.overlap], first[:, :, first.shape[2] - self.overlap :]
        pairs = torch.stack([torch.cat([first, start], 2), torch.cat([second, end], 2)], 1)
        return pairs.flatten(0, 1)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, cluster_size={self.cluster_size}, "
            f"overlap={self.overlap}"
        )
