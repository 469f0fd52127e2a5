"""Semantic correspondence: maps of several backbones fused, and matched by nearest place."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, full_precision
from weft.ops.pairwise.nearest import nearest


class Correspondence(NamedTuple):
    """For each place of a source map its nearest place of a target map.

    Attributes:
        index: ``(B, H, W)`` int64, the place of the target, numbered row by row; -1 outside a mask.
        similarity: ``(B, H, W)``, the cosine, differentiable; -infinity outside a mask.
    """

    index: Tensor
    similarity: Tensor


def fuse_features(*maps: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    r"""One map of the maps of several backbones, each with a fixed part in every cosine.

    .. math::
        F = \big[ w_1 \tfrac{f_1}{\lVert f_1 \rVert}, \dots, w_n \tfrac{f_n}{\lVert f_n \rVert}
            \big]

    so that :math:`\cos(F_i, F_j) = \sum_k w_k^2 \cos(f_{ki}, f_{kj}) / \sum_k w_k^2`. Two maps with
    the weights :math:`\alpha, 1 - \alpha` are the paper's fusion of Stable Diffusion and DINO.

    Args:
        maps: ``(B, D_k, H_k, W_k)``; those of another size than the first are resized to it,
            bilinearly.
        weights: one for each map, >= 0; None: equal ones that sum to 1.

    Returns:
        ``(B, sum D_k, H, W)`` in the dtype of the first.

    Raises:
        ValueError: no maps, shapes that do not match, another number of weights, negative ones.
        TypeError: maps that are not floating-point.

    Source: Zhang et al., "A Tale of Two Features: Stable Diffusion Complements DINO for Zero-Shot
    Semantic Correspondence", NeurIPS 2023, section 3.
    """
    if not maps:
        raise ValueError("maps: at least one is needed")
    weights = [1 / len(maps)] * len(maps) if weights is None else list(weights)
    if len(weights) != len(maps) or not all(weight >= 0 for weight in weights):
        raise ValueError(f"weights must be {len(maps)} numbers >= 0, got {weights}")
    for number, x in enumerate(maps):
        _check_map(f"maps[{number}]", x)
        if len(x) != len(maps[0]):
            raise ValueError(f"maps[{number}] must have {len(maps[0])} samples, got {len(x)}")
    parts = []
    for x, weight in zip(maps, weights, strict=True):
        x = _resized(x, maps[0].shape[2:])
        parts.append(weight * F.normalize(x, dim=1).to(maps[0].dtype))
    return torch.cat(parts, 1)


def joint_pca(source: Tensor, target: Tensor, components: int) -> tuple[Tensor, Tensor]:
    r"""Both maps of a pair on the main directions of the places of the two together.

    The common mean is taken away, so that what the pair has in common does not outweigh the rest.
    For the maps of several layers: this of each, then :func:`fuse_features` or a concatenation.

    Args:
        source: ``(B, D, H, W)``.
        target: ``(B, D, H', W')``, one for each source.
        components: k, from 1 to D.

    Returns:
        ``(B, k, H, W)`` and ``(B, k, H', W')`` in the dtypes of the inputs; the directions are
        computed in float32 or wider, one after the other by falling variance, each up to its sign.
        Only the projection is differentiated, not the directions.

    Raises:
        ValueError: shapes that do not match, too many components.
        TypeError: maps that are not floating-point.

    Source: Zhang et al., "A Tale of Two Features: Stable Diffusion Complements DINO for Zero-Shot
    Semantic Correspondence", NeurIPS 2023, section 3.2.
    """
    _check_pair(source, target)
    D = source.shape[1]
    if not isinstance(components, int) or not 1 <= components <= D:
        raise ValueError(f"components must be from 1 to {D}, got {components!r}")
    with full_precision(source):
        wide = [at_least_float32(x.flatten(2).mT) for x in (source, target)]
        with torch.no_grad():
            both = torch.cat(wide, 1)
            mean = both.mean(1, keepdim=True)
            centered = both - mean
            directions = torch.linalg.eigh(centered.mT @ centered).eigenvectors
            directions = directions.flip(-1)[..., :components]
        found = [(rows - mean) @ directions for rows in wide]
    return tuple(
        rows.mT.unflatten(2, x.shape[2:]).to(x.dtype)
        for rows, x in zip(found, (source, target), strict=True)
    )


def nearest_correspondence(
    source: Tensor,
    target: Tensor,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
) -> Correspondence:
    r"""The place of the target that is most similar to each place of the source.

    .. math:: \text{index}_{bi} = \arg\max_j \cos(f^s_{bi}, f^t_{bj})

    Exact, by ``weft.nearest``: the matrix of all pairs of places is never stored.

    Args:
        source: ``(B, D, H, W)``.
        target: ``(B, D, H', W')``.
        source_mask: ``(B, H, W)`` bool, the places that are matched; None: all.
        target_mask: ``(B, H', W')`` bool, the places that they are matched with.

    Returns:
        A :class:`Correspondence`.

    Raises:
        ValueError: shapes that do not match.
        TypeError: maps of dtypes that differ or are not floating-point, masks that are not bool.

    Source: Zhang et al., "A Tale of Two Features: Stable Diffusion Complements DINO for Zero-Shot
    Semantic Correspondence", NeurIPS 2023, section 3.
    """
    _check_pair(source, target)
    masks = []
    for name, mask, x in (
        ("source_mask", source_mask, source),
        ("target_mask", target_mask, target),
    ):
        shape = (len(x), *x.shape[2:])
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=x.device)
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {mask.dtype}")
        if mask.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(mask.shape)}")
        masks.append(mask.flatten(1))
    B, _, H, W = source.shape
    indices = torch.full((B, H * W), -1, dtype=torch.int64, device=source.device)
    similarities = []
    for b in range(B):
        rows, columns = (mask[b].nonzero()[:, 0] for mask in masks)
        found = nearest(
            source[b].flatten(1).mT[rows], target[b].flatten(1).mT[columns], 1, "cosine"
        )
        if len(columns):
            indices[b, rows] = columns[found.indices[:, 0]]
        similarity = source.new_full((H * W,), -torch.inf)
        similarities.append(similarity.index_put((rows,), found.values[:, 0]))
    similarity = torch.stack(similarities) if similarities else source.new_empty(0, H * W)
    return Correspondence(indices.view(B, H, W), similarity.view(B, H, W))


def _check_map(name: str, x: Tensor) -> None:
    check_features(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be (B, D, H, W), got {tuple(x.shape)}")


def _check_pair(source: Tensor, target: Tensor) -> None:
    _check_map("source", source)
    _check_map("target", target)
    if source.shape[:2] != target.shape[:2]:
        raise ValueError(
            "target must have the samples and channels of source, "
            f"{tuple(source.shape[:2])}, got {tuple(target.shape[:2])}"
        )


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
