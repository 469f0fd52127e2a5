"""What the replacements of several packages share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.masks import Causal, Mask, Segments
from weft.ops.attention.attention import attention
from weft.ops.attention.biases import RelativeBias

LARGEST_LOGIT_SCALE = math.log(100.0)  # Liu et al., "Swin Transformer V2", CVPR 2022, section 3.3


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Mask | Tensor | None = None,
    *,
    is_causal: bool = False,
    bias: Tensor | None = None,
    **options: object,
) -> Tensor:
    """:func:`weft.attention` with the masks of ``scaled_dot_product_attention``: bool, True for
    pairs that attend, or floats that are added to the scores. ``is_causal`` comes before a mask."""
    mask = Causal() if is_causal else attn_mask
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        bias, mask = mask if bias is None else bias + mask, None
    if bias is not None:
        bias = bias.to(query.dtype)
    enable_gqa = key.shape[1] != query.shape[1]
    return attention(query, key, value, mask=mask, bias=bias, enable_gqa=enable_gqa, **options)


def table_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    index: Tensor,
    shift_mask: Tensor | None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Swin: windows ``(windows, H, N, D)``, a table ``(T, H)`` read by an index of N × N numbers,
    and a shift mask ``(nW, N, N)``, 0 within a region and -100 or so elsewhere."""
    N = query.shape[2]
    return attention(
        query,
        key,
        value,
        mask=None if shift_mask is None else Segments(region_ids(shift_mask)),
        bias=RelativeBias(table, index.view(N, N)),
        scale=scale,
        dropout_p=dropout_p,
    )


def cosine_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit_scale: Tensor,
    positions: Tensor,
    index: Tensor,
    shift_mask: Tensor | None,
    *,
    dropout_p: float,
) -> Tensor:
    """Swin V2: cosines of queries and keys by a learned factor of each head, ``logit_scale``
    ``(H, 1, 1)`` its logarithm, and ``positions`` ``(..., H)`` the position network's output."""
    factor = logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()
    return table_window_attention(
        F.normalize(query, dim=-1) * factor,
        F.normalize(key, dim=-1),
        value,
        16 * positions.flatten(0, -2).sigmoid(),
        index,
        shift_mask,
        scale=1.0,
        dropout_p=dropout_p,
    )


def region_ids(shift_mask: Tensor) -> Tensor:
    """(nW, N) labels of a shift mask (nW, N, N), 0 where a pair attends and less elsewhere: the
    first position that each position attends to, which those of a region have in common."""
    return shift_mask.max(-1).indices
