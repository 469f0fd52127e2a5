"""Cross-attention of segment queries to the pixels inside their predicted masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.attention.heads import check_heads, check_map, check_tokens, merge_heads, split_heads
from weft.nn.checks import check_features
from weft.ops.attention.attention import attention


def masks_from_logits(logits: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    r"""Where segments are: True for pixels whose mask probability is at least one half.

    The logits are resized bilinearly to the grid of the features that are attended to, and cut at
    0. A query whose mask is empty there sees every pixel.

    Args:
        logits: ``(B, Q, h, w)`` mask logits of Q queries.
        size: height and width of the features; None leaves the logits' own.

    Returns:
        ``(B, Q, height * width)`` bool, pixels row by row; without gradient.

    Raises:
        ValueError: shapes.
        TypeError: logits that are not floating-point.

    Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation",
    CVPR 2022, equation 3; the rule for empty masks is that of the authors' code.
    """
    check_features("logits", logits)
    if logits.dim() != 4:
        raise ValueError(f"logits must be (B, Q, h, w), got {tuple(logits.shape)}")
    logits = logits.detach()
    if size is not None and tuple(size) != tuple(logits.shape[2:]):
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    return see_all_if_empty((logits >= 0).flatten(2))


def see_all_if_empty(mask: Tensor) -> Tensor:
    """True in the rows of a bool mask that were all False."""
    return mask | ~mask.any(-1, keepdim=True)


class MaskedCrossAttention(nn.Module):
    r"""Mask2Former's masked attention: each query sees the pixels of its own predicted segment.

    .. math::
        \text{out} = \text{LN}\big(x + W_O \, \mathrm{softmax}(M + Q K^\top / \sqrt d) \, V\big),
        \qquad Q = W_Q (x + p_x), \quad K = W_K (y + p_y), \quad V = W_V \, y

    with M = 0 inside the mask of a query and minus infinity outside. A query whose mask is empty
    sees every pixel. The mask is packed into bits and its empty tiles are skipped: the smaller the
    segments, the fewer products.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        device, dtype: of the parameters.

    Attributes:
        in_proj_weight, in_proj_bias, out_proj: named as in ``torch.nn.MultiheadAttention``.
        norm: the LayerNorm behind the residual.

    Shapes: query ``(B, Q, C)``, memory ``(B, N, C)``, mask ``(B, Q, N)`` or ``(B, H, Q, N)`` bool,
    True inside, or None; positions are added to the query, or to the memory where it is a key, and
    have a shape that broadcasts to theirs. The result is ``(B, Q, C)``.

    Raises:
        ValueError: sizes, shapes that do not match.
        TypeError: tensors that are not floating-point, a mask that is not bool.

    Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation",
    CVPR 2022, equation 2, with the projections, positions and norm of the authors' code.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, device=None, dtype=None):
        super().__init__()
        check_heads(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        factory = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim, **factory))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim, **factory))
        self.out_proj = nn.Linear(dim, dim, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        *,
        query_position: Tensor | None = None,
        memory_position: Tensor | None = None,
    ) -> Tensor:
        check_tokens("query", query, self.dim)
        check_tokens("memory", memory, self.dim)
        if memory.shape[0] != query.shape[0]:
            raise ValueError(
                f"memory must have the batch of query, {query.shape[0]}, got {memory.shape[0]}"
            )
        inputs = (
            query if query_position is None else query + query_position,
            memory if memory_position is None else memory + memory_position,
            memory,
        )
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            split_heads(F.linear(*each), self.num_heads)
            for each in zip(inputs, weights, biases, strict=True)
        )
        out = attention(q, k, v, mask=self._mask(mask, query, memory))
        return self.norm(query + self.out_proj(merge_heads(out)))

    def _mask(self, mask: Tensor | None, query: Tensor, memory: Tensor) -> Tensor | None:
        if mask is None:
            return None
        mask = check_segments(mask, query.shape[0], self.num_heads, query.shape[1], memory.shape[1])
        return see_all_if_empty(mask)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


def check_segments(mask: Tensor, B: int, H: int, Q: int, N: int) -> Tensor:
    """A mask of segments, with a dimension of heads."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
    if mask.shape not in ((B, Q, N), (B, H, Q, N)):
        raise ValueError(f"mask must be {(B, Q, N)} or {(B, H, Q, N)}, got {tuple(mask.shape)}")
    return mask.unsqueeze(1) if mask.dim() == 3 else mask


class PrototypeCrossAttention(nn.Module):
    r"""PEM's cross-attention: each query takes one pixel, its prototype, for each head.

    .. math::
        g_{hq} = \arg\max_{n \in M_q} \langle K_{hn}, Q_{hq} \rangle, \qquad
        K^p_q = [K_{h, g_{hq}}]_h, \qquad
        \text{out} = x + W_O \Big( \alpha \odot
            \frac{W_A (K^p \odot Q)}{\lVert W_A (K^p \odot Q) \rVert_{\text{queries}}}
            + K^p \Big)

    with rows K and Q of norm 1: K from the pixels by batch norm, a depthwise 3 x 3 convolution and
    a linear layer, Q from the queries by LayerNorm and a linear layer. The norm in the fraction is
    that of each channel over the queries, as the authors' code has it. The products of queries and
    pixels that the choice needs have no gradient and are not kept; the values of the attention
    disappear.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        device, dtype: of the parameters.

    Attributes:
        feature_proj, query_proj, proj, final, alpha: named as in the authors' code.

    Shapes: query ``(B, Q, C)``, memory ``(B, C, height, width)``, mask ``(B, Q, height * width)``
    or ``(B, H, Q, height * width)`` bool, True inside (see :func:`weft.nn.masks_from_logits`), or
    None; positions have a shape that broadcasts to what they are added to. The result is
    ``(B, Q, C)``. A query whose mask is empty chooses among all pixels (in the authors' code it
    takes the first pixel, unless the masks of all queries are empty).

    Raises:
        ValueError: sizes, shapes that do not match.
        TypeError: tensors that are not floating-point, a mask that is not bool.

    Source: Cavagnero et al., "PEM: Prototype-based Efficient MaskFormer for Image Segmentation",
    CVPR 2024, section 3.2, and the authors' code.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, device=None, dtype=None):
        super().__init__()
        check_heads(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        factory = {"device": device, "dtype": dtype}
        self.feature_proj = _LocalFeatures(dim, **factory)
        norm = nn.LayerNorm(dim, **factory)
        self.query_proj = nn.Sequential(norm, nn.Linear(dim, dim, **factory))
        self.proj, self.final = (nn.Linear(dim, dim, **factory) for _ in range(2))
        self.alpha = nn.Parameter(torch.ones(1, 1, dim, **factory))

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        *,
        query_position: Tensor | None = None,
        memory_position: Tensor | None = None,
    ) -> Tensor:
        check_tokens("query", query, self.dim)
        check_map("memory", memory, self.dim)
        if memory.shape[0] != query.shape[0]:
            raise ValueError(
                f"memory must have the batch of query, {query.shape[0]}, got {memory.shape[0]}"
            )
        x = query if query_position is None else query + query_position
        y = memory if memory_position is None else memory + memory_position
        q = F.normalize(self.query_proj(x), dim=-1)
        k = F.normalize(self.feature_proj(y), dim=-1)
        prototypes = self._prototypes(q, k, mask)
        change = F.normalize(self.proj(prototypes * q), dim=1)
        return query + self.final((change * self.alpha + prototypes).to(prototypes.dtype))

    def _prototypes(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Of pixels k ``(B, N, C)``, the most similar to each query and head, ``(B, Q, C)``."""
        q, k = (split_heads(t, self.num_heads) for t in (q, k))
        B, H, Q, D = q.shape
        with torch.no_grad():
            similarity = q @ k.mT
            if mask is not None:
                mask = see_all_if_empty(check_segments(mask, B, H, Q, k.shape[2]))
                similarity = similarity.masked_fill(~mask, -torch.inf)
            chosen = similarity.argmax(-1)
        return merge_heads(k.gather(2, chosen[..., None].expand(-1, -1, -1, D)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class _LocalFeatures(nn.Module):
    """Pixels ``(B, C, height, width)`` with their neighbors, as tokens ``(B, N, C)``."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, **factory)
        self.to_query_3x3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.out = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.to_query_3x3(self.bn(x)).flatten(2).mT)
