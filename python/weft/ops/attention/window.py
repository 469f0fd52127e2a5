"""Attention within many small windows."""

from torch import Tensor

from weft.masks import Segments
from weft.ops.attention.attention import attention
from weft.ops.attention.biases import Bias


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | Bias | None,
    region_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""``weft.attention`` of many windows of few tokens, as in Swin transformers.

    .. math:: O = \mathrm{softmax}(\text{scale} \cdot Q K^\top + \text{bias}) V

    in each window, over the keys of the query's own region. The windows of a shifted grid hold
    parts of the image that are not neighbours: as labels they cost one integer for each token,
    where a mask would be a matrix for each window.

    Args:
        query, key, value: ``(windows, H, N, D)``, any strides.
        bias: ``(H, N, N)`` or any tensor that broadcasts to (windows, H, N, N), with gradient; a
            ``weft.RelativeBias``; or None.
        region_ids: ``(nW, N)`` int64, of the windows w mod nW; nW divides the windows.
        scale: 1 / √D if None.

    Returns:
        ``(windows, H, N, Dv)``, laid out as (windows, N, H, Dv).

    Raises:
        ValueError, TypeError: as ``weft.attention``.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    ICCV 2021, equation 4 and section 3.2.
    """
    mask = None
    if region_ids is not None:
        if not isinstance(region_ids, Tensor) or region_ids.dim() != 2:
            raise ValueError(
                f"region_ids must be (nW, N), got {tuple(getattr(region_ids, 'shape', ()))}"
            )
        mask = Segments(region_ids)
    return attention(query, key, value, mask=mask, bias=bias, scale=scale)
