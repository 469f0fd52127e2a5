"""Directions that name a concept, kept in features or removed from them."""

import torch
from torch import Tensor, nn

from weft.nn.checks import at_least_float32, check_features, full_precision
from weft.ops.pairwise.nearest import nearest
from weft.ops.pairwise.subspace_project import subspace_project


def concept_basis(vectors: Tensor, rank: int | None = None) -> Tensor:
    r"""The main directions of a set of vectors, not centred: right singular vectors.

    Args:
        vectors: ``(m, D)``, m >= 1; signs and order do not matter.
        rank: how many directions, from 1 to min(m, D); None: all.

    Returns:
        ``(D, rank)`` with orthonormal columns, by falling singular value, in the dtype of
        ``vectors``; computed in float32 or wider. Columns beyond the numerical rank of the vectors
        are 0: they name nothing.

    Raises:
        ValueError: shapes, a rank out of range.
        TypeError: vectors that are not floating-point.
    """
    check_features("vectors", vectors)
    if vectors.dim() != 2 or not len(vectors):
        raise ValueError(f"vectors must be (m, D) with m >= 1, got {tuple(vectors.shape)}")
    most = min(vectors.shape)
    rank = most if rank is None else rank
    if not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(f"rank must be from 1 to {most}, got {rank!r}")
    with full_precision(vectors):
        wide = at_least_float32(vectors)
        _, values, rows = torch.linalg.svd(wide, full_matrices=False)
    smallest = values[0] * max(wide.shape) * torch.finfo(wide.dtype).eps  # of numerical rank
    used = (values > smallest)[:rank, None]
    return rows[:rank].masked_fill(~used, 0).mT.to(vectors.dtype)


def prompt_differences(*groups: Tensor) -> Tensor:
    """Differences of text embeddings, whose main directions are the concept that sets them apart.

    Args:
        groups: ``(n_i, D)``. One group: the embeddings of prompts that differ in the concept, of
            which all pairs are taken. Several: one for each value of the concept, of which pairs of
            different groups are taken.

    Returns:
        ``(m, D)``, one row for each pair, the first minus the second.

    Raises:
        ValueError: no group, shapes that differ, a single prompt.
        TypeError: groups that are not floating-point.

    Source: Yun et al., "Language-Assisted Feature Transformation for Anomaly Detection", ICLR 2025.
    """
    if not groups:
        raise ValueError("groups: at least one is needed")
    for group in groups:
        check_features("groups", group, groups[0].shape[-1])
        if group.dim() != 2:
            raise ValueError(f"groups must be (n, D), got {tuple(group.shape)}")
    if len(groups) == 1:
        (prompts,) = groups
        if len(prompts) < 2:
            raise ValueError("groups: one group needs at least two prompts")
        first, second = torch.triu_indices(len(prompts), len(prompts), 1, device=prompts.device)
        return prompts[first] - prompts[second]
    pairs = [(a[:, None] - b).flatten(0, 1) for i, a in enumerate(groups) for b in groups[i + 1 :]]
    return torch.cat(pairs)


class ConceptProjection(nn.Module):
    r"""Keeps the part of features that a concept describes, or the part that it does not.

    .. math::
        \texttt{"guide"}: \; x \mapsto V V^\top x, \qquad
        \texttt{"ignore"}: \; x \mapsto x - V V^\top x

    with V the main directions of :func:`concept_basis`. What is unusual among the results, by
    :func:`knn_anomaly_score`, is unusual in the attribute that was asked for, or in all others.

    Args:
        vectors: ``(m, D)``, vectors that name the concept: :func:`prompt_differences` of text
            embeddings.
        rank: number of directions; None: all.
        mode: ``"guide"`` or ``"ignore"``.

    Attributes:
        basis: ``(D, rank)``, orthonormal columns.

    Shapes: features ``(..., D)`` in the dtype of the basis, the same result; runs on
    :func:`weft.subspace_project`, which never forms the D x D projector.

    Raises:
        ValueError: shapes, a rank out of range, a mode that is none.
        TypeError: vectors that are not floating-point.

    Source: Yun et al., "Language-Assisted Feature Transformation for Anomaly Detection", ICLR 2025.
    """

    def __init__(self, vectors: Tensor, rank: int | None = None, *, mode: str = "guide"):
        super().__init__()
        if mode not in ("guide", "ignore"):
            raise ValueError(f"mode must be 'guide' or 'ignore', got {mode!r}")
        self.mode = mode
        self.register_buffer("basis", concept_basis(vectors.detach(), rank).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return subspace_project(x, self.basis, self.mode == "ignore")

    def extra_repr(self) -> str:
        D, rank = self.basis.shape
        return f"in_features={D}, rank={rank}, mode={self.mode!r}"


def knn_anomaly_score(x: Tensor, normal: Tensor, k: int = 30) -> Tensor:
    """Mean cosine distance to the k nearest of a bank of normal features.

    Args:
        x: ``(B, D)``.
        normal: ``(N, D)``, N >= 1.
        k: number of neighbours, >= 1; all N, where there are fewer.

    Returns:
        ``(B,)``, from 0 to 2, the larger the more unusual. By :func:`weft.nearest`: exact, and the
        matrix of all distances is never stored.

    Raises:
        ValueError: shapes, k < 1.
        TypeError: features that are not floating-point.

    Source: Yun et al., "Language-Assisted Feature Transformation for Anomaly Detection", ICLR 2025.
    """
    check_features("normal", normal)
    if normal.dim() != 2 or not len(normal):
        raise ValueError(f"normal must be (N, D) with N >= 1, got {tuple(normal.shape)}")
    check_features("x", x, normal.shape[1])
    if x.dim() != 2:
        raise ValueError(f"x must be (B, {normal.shape[1]}), got {tuple(x.shape)}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}")
    return 1 - nearest(x, normal, min(k, len(normal)), metric="cosine").values.mean(1)


def remove_directions(
    x: Tensor, undesired: Tensor, *, strength: float = 1.0, rank: int | None = None
) -> Tensor:
    r"""Removes from embeddings what lies in the span of undesired ones, wholly or in part.

    .. math::
        X' = X - \alpha X \tilde V \tilde V^\top, \qquad \tilde X = \tilde U \tilde \Sigma
        \tilde V^\top

    Args:
        x: ``(..., D)``, the token embeddings of a prompt.
        undesired: ``(m, D)``, m >= 1: embeddings whose semantics are not wanted.
        strength: alpha; 1 removes the span, 0 nothing.
        rank: how many main directions of ``undesired`` count; None: all.

    Returns:
        The shape and dtype of ``x``. Differentiable in ``x``; ``undesired`` is taken as given.

    Raises:
        ValueError: shapes, a rank out of range.
        TypeError: tensors that are not floating-point.

    Source: Jang et al., "DECOR:Decomposition and Projection of Text Embeddings for Text-to-Image
    Customization", 2024 (arXiv 2412.09169).
    """
    check_features("x", x)
    check_features("undesired", undesired, x.shape[-1])
    basis = concept_basis(undesired.detach(), rank).to(x.dtype)
    if strength == 1:
        return subspace_project(x, basis, True)
    return x - strength * subspace_project(x, basis)
