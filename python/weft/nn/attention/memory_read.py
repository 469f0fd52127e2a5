"""Reading of a memory of frames by weighted distances, as in XMem and ColorMNet."""

import torch
from torch import Tensor

from weft.nn.checks import at_least_float32, check_features, full_precision
from weft.ops.attention.attention import attention


def memory_read(
    query: Tensor,
    selection: Tensor,
    key: Tensor,
    shrinkage: Tensor,
    value: Tensor,
    *,
    return_usage: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""What a memory holds at the places that look like the query's.

    .. math::
        S_{ij} = -\frac{s_j}{\sqrt{C}} \sum_c e_{ic} (k_{jc} - q_{ic})^2, \qquad
        \text{out}_i = \sum_j \mathrm{softmax}_j(S_{ij}) \, v_j, \qquad
        \text{usage}_j = \sum_i \mathrm{softmax}_j(S_{ij})

    over all places j of all frames. The selection e says which channels matter to place i, the
    shrinkage s how sure a memory is of itself. With the square expanded, S is one product of
    2 C + 1 columns, so that :func:`weft.attention` reads the memory and, by its key sums, counts
    the use that a memory manager keeps or drops entries by. Computed in float32 or wider, also
    under autocast: differences of squares do not survive half precision.

    Args:
        query, selection: ``(B, C, H, W)`` of the frame that reads; e >= 0.
        key: ``(B, C, T, H', W')`` of the T frames in memory.
        shrinkage: ``(B, 1, T, H', W')``, > 0.
        value: ``(B, V, T, H', W')``, several objects as groups of channels.
        return_usage: whether to count.

    Returns:
        ``(B, V, H, W)`` in the dtype of value; with ``return_usage`` also ``(B, T, H', W')`` in
        float32 or wider. All inputs have gradients.

    Raises:
        ValueError: shapes that do not match, an empty memory.
        TypeError: tensors that are not floating-point.

    Source: Cheng and Schwing, "XMem: Long-Term Video Object Segmentation with an Atkinson-Shiffrin
    Memory Model", ECCV 2022, anisotropic L2 similarity; Yang et al., "ColorMNet: A Memory-based
    Deep Spatial-Temporal Feature Propagation Network for Video Colorization", ECCV 2024.
    """
    tensors = {"query": query, "selection": selection, "key": key, "shrinkage": shrinkage}
    for name, x in {**tensors, "value": value}.items():
        check_features(name, x)
    if query.dim() != 4 or selection.shape != query.shape:
        raise ValueError(
            "query and selection must be (B, C, H, W) both, "
            f"got {tuple(query.shape)} and {tuple(selection.shape)}"
        )
    B, C, H, W = query.shape
    places = key.shape[2:]
    if key.dim() != 5 or key.shape[:2] != (B, C) or 0 in places:
        raise ValueError(f"key must be ({B}, {C}, T, H', W'), not empty, got {tuple(key.shape)}")
    if shrinkage.shape != (B, 1, *places):
        raise ValueError(f"shrinkage must be {(B, 1, *places)}, got {tuple(shrinkage.shape)}")
    if value.dim() != 5 or value.shape[0] != B or value.shape[2:] != places:
        raise ValueError(f"value must be ({B}, V, {', '.join(map(str, places))}), "
                         f"got {tuple(value.shape)}")  # fmt: skip
    with full_precision(query):
        q, e, k, s, v = (
            at_least_float32(t).flatten(2).mT for t in (query, selection, key, shrinkage, value)
        )
        queries = torch.cat([2 * e * q, -e, -(e * q.square()).sum(2, keepdim=True)], 2)
        keys = torch.cat([s * k, s * k.square(), s], 2)
        heads = (t[:, None] for t in (queries, keys, v))
        result = attention(*heads, scale=C**-0.5, return_key_sums=return_usage)
    out, usage = result if return_usage else (result, None)
    out = out[:, 0].mT.unflatten(2, (H, W)).to(value.dtype)
    return (out, usage[:, 0].unflatten(1, tuple(places))) if return_usage else out
