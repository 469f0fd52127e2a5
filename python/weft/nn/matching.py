"""Matches between two sets of features: dual softmax, and mutual nearest neighbours."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import check_features
from weft.ops.checks import values_are_checked
from weft.ops.pairwise.nearest import SIMILARITIES, nearest
from weft.ops.pairwise.pairwise import pairwise


class Matches(NamedTuple):
    """K pairs of points of two sets, sorted by ``batch``, then ``x_index``.

    Attributes:
        batch: ``(K,)`` int64, the problem of each pair.
        x_index: ``(K,)`` int64, its point of x; places of a map are numbered row by row.
        y_index: ``(K,)`` int64, its point of y.
        score: ``(K,)``, the confidence, distance or similarity of the pair, differentiable.
    """

    batch: Tensor
    x_index: Tensor
    y_index: Tensor
    score: Tensor


def mutual_nearest(
    x: Tensor,
    y: Tensor,
    *,
    metric: str = "cosine",
    threshold: float | None = None,
    ratio: float | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
) -> Matches:
    r"""The pairs of points that are each other's nearest.

    .. math::
        \{(i, j) : j = \arg\min_{j'} d(x_i, y_{j'}), \; i = \arg\min_{i'} d(x_{i'}, y_j)\}

    Exact, by ``weft.nearest`` in both directions; the matrix of all pairs is never stored.

    Args:
        x: ``(N, D)`` or ``(B, N, D)``.
        y: ``(M, D)`` or ``(B, M, D)``.
        metric: dot, cosine, sqeuclidean, euclidean, l1, rbf or log, as in ``weft.nearest``.
        threshold: keeps pairs with a distance below it, or a similarity above it.
        ratio: of distances, keeps pairs with ``d(x_i, y_j) < ratio * d(x_i, second nearest)``.
            Where y has one point there is no second: the pair is kept.
        x_lengths: ``(B,)`` int64 in ``[0, N]``: points from there on are padding, never read.
        y_lengths: ``(B,)`` int64 in ``[0, M]``.

    Returns:
        :class:`Matches`. The number of pairs depends on values: it waits for a GPU.

    Raises:
        ValueError: shapes that do not match, a ratio of similarities, lengths out of range.
        TypeError: dtypes that differ or are not supported.

    Source: Lowe, "Distinctive Image Features from Scale-Invariant Keypoints", IJCV 2004, section
    7.1 (the ratio); mutual nearest neighbours as in Rocco et al., "Neighbourhood Consensus
    Networks", NeurIPS 2018, section 3.2.
    """
    check_features("x", x)
    check_features("y", y, x.shape[-1])
    if x.dim() not in (2, 3) or y.dim() != x.dim() or y.shape[:-2] != x.shape[:-2]:
        raise ValueError(
            "x and y must be (N, D) and (M, D) or (B, N, D) and (B, M, D), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if ratio is not None and metric in SIMILARITIES:
        raise ValueError(f"ratio is of distances, not of {metric}")
    if x.dim() == 2:
        x, y = x[None], y[None]
    sizes = []
    for name, lengths, points in (("x_lengths", x_lengths, x), ("y_lengths", y_lengths, y)):
        sizes.append(_lengths(name, lengths, *points.shape[:2]))
    found = []
    for problem, (n, m) in enumerate(zip(*sizes, strict=True)):
        of_x = nearest(x[problem, :n], y[problem, :m], 1 if ratio is None else 2, metric)
        back = nearest(y[problem, :m], x[problem, :n], 1, metric).indices[:, 0]
        i, j, score = _mutual(of_x.indices[:, 0], back, of_x.values[:, 0])
        keep = torch.ones_like(i, dtype=torch.bool)
        if threshold is not None:
            keep &= score > threshold if metric in SIMILARITIES else score < threshold
        if ratio is not None:
            keep &= score < ratio * of_x.values[i, 1]
        found.append((i[keep], j[keep], score[keep]))
    return _joined(found, x)


def _lengths(name: str, lengths: Tensor | None, B: int, most: int) -> list[int]:
    if lengths is None:
        return [most] * B
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {getattr(lengths, 'dtype', type(lengths))}")
    if lengths.shape != (B,):
        raise ValueError(f"{name} must be ({B},), got {tuple(lengths.shape)}")
    sizes = lengths.tolist()
    if values_are_checked(lengths) and not all(0 <= size <= most for size in sizes):
        raise ValueError(f"{name} must be in [0, {most}], got {min(sizes)} to {max(sizes)}")
    return sizes


def _mutual(there: Tensor, back: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(i, j, score) of the rows i whose column there[i] has its best row at i."""
    i = torch.arange(len(there), device=there.device)
    if not len(back):  # no columns: nothing is near
        return i[:0], i[:0], score[:0]
    mutual = (there >= 0) & (back[there.clamp(min=0)] == i)
    return i[mutual], there[mutual], score[mutual]


def _joined(found: list[tuple[Tensor, Tensor, Tensor]], like: Tensor) -> Matches:
    none = torch.empty(0, dtype=torch.int64, device=like.device)
    batch = [torch.full_like(i, problem) for problem, (i, _, _) in enumerate(found)]
    parts = [*zip(*found, strict=True)] or [[], [], []]
    i, j = (torch.cat([none, *part]) for part in parts[:2])
    return Matches(torch.cat([none, *batch]), i, j, torch.cat([like.new_empty(0), *parts[2]]))


class DualSoftmaxMatching(nn.Module):
    r"""Matches the places of two feature maps by the product of two softmaxes.

    .. math::
        P_{ij} = \mathrm{softmax}_{j'}(S_{i\cdot})_j \; \mathrm{softmax}_{i'}(S_{\cdot j})_i,
        \qquad S_{ij} = \frac{\langle x_i, y_j \rangle}{D \tau}

    A match is a pair that is the largest of its row and of its column of P, whose confidence is
    above ``threshold``, and whose places are not within ``border`` of the edge of their maps. With
    ``nms`` its place in x also has the largest confidence, :math:`\max_j P_{ij}`, of a window
    around it: CasMTR keeps such key points in its finer stages.

    The matches are found without the matrix: with the logarithms of the sums of rows, r, and of
    columns, c, the row's best column is that of :math:`2 S_{ij} - c_j`, a nearest neighbour with a
    bias, and the column's best row that of :math:`2 S_{ij} - r_i`. Of equal pairs the first counts.

    Args:
        temperature: :math:`\tau` > 0.
        threshold: >= 0.
        border: how many places at each edge have no match, >= 0.
        nms: the side of the window, odd; None: every place.

    Shapes: x ``(B, D, H, W)``, y ``(B, D, H', W')``, masks ``(B, H, W)`` and ``(B, H', W')`` bool,
    True where the image is (padding is below and to the right; edges are those of the image);
    :class:`Matches`, with confidences that are differentiable, in the dtype of x.
    ``confidences`` gives all of P, ``(B, HW, H'W')``, to train on; 0 where a mask is False.

    Raises:
        ValueError: numbers out of range, shapes that do not match.
        TypeError: features that are not floating-point, masks that are not bool.

    Source: Sun et al., "LoFTR: Detector-Free Local Feature Matching with Transformers", CVPR 2021,
    section 3.3; Cao and Fu, "Improving Transformer-based Image Matching by Cascaded Capturing
    Spatially Informative Keypoints", ICCV 2023, section 3.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        threshold: float = 0.2,
        border: int = 2,
        nms: int | None = None,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if not threshold >= 0:
            raise ValueError(f"threshold must be >= 0, got {threshold}")
        if not isinstance(border, int) or border < 0:
            raise ValueError(f"border must be an integer >= 0, got {border!r}")
        if nms is not None and (not isinstance(nms, int) or nms < 1 or nms % 2 == 0):
            raise ValueError(f"nms must be an odd integer >= 1, got {nms!r}")
        self.temperature, self.threshold = float(temperature), float(threshold)
        self.border, self.nms = border, nms

    def confidences(
        self, x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None
    ) -> Tensor:
        """All of P, ``(B, HW, H'W')``, differentiable."""
        self._check(x, y, x_mask, y_mask)
        rows, columns = x.flatten(2).mT, y.flatten(2)
        scores = rows @ columns / (x.shape[1] * self.temperature)
        allowed = scores.new_ones((), dtype=torch.bool)
        if x_mask is not None:
            allowed = allowed & x_mask.flatten(1)[:, :, None]
        if y_mask is not None:
            allowed = allowed & y_mask.flatten(1)[:, None]
        # A finite number: a row of -infinities has no softmax, and is 0 in the end.
        scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
        return torch.where(allowed, scores.softmax(1) * scores.softmax(2), 0)

    def forward(
        self, x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None
    ) -> Matches:
        self._check(x, y, x_mask, y_mask)
        masks = [_full(x) if x_mask is None else x_mask, _full(y) if y_mask is None else y_mask]
        inner = [self._inner(mask) for mask in masks]
        found = []
        for b in range(len(x)):
            places = [mask[b].flatten().nonzero()[:, 0] for mask in masks]
            rows = x[b].flatten(1).mT[places[0]]
            columns = y[b].flatten(1).mT[places[1]]
            i, j, score = self._match(rows, columns, places[0], x.shape[2:])
            i, j = places[0][i], places[1][j]
            keep = (score > self.threshold) & inner[0][b, i] & inner[1][b, j]
            found.append((i[keep], j[keep], score[keep]))
        return _joined(found, x)

    def _match(self, rows, columns, places, size) -> tuple[Tensor, Tensor, Tensor]:
        """(i, j, P_ij) of the pairs that are the largest of row and column, after the NMS."""
        if not len(rows) or not len(columns):
            none = torch.empty(0, dtype=torch.int64, device=rows.device)
            return none, none, rows.new_empty(0)
        scale = 1 / (rows.shape[1] * self.temperature)
        options = {"pair": "dot", "scale": scale, "reduce": "logsumexp", "over": "both"}
        of_rows, of_columns = pairwise(rows, columns, **options)
        best = nearest(rows, columns, 1, "dot", scale=2 * scale, bias=-of_columns)
        back = nearest(columns, rows, 1, "dot", scale=2 * scale, bias=-of_rows).indices[:, 0]
        confidence = (best.values[:, 0] - of_rows).exp()
        i, j, score = _mutual(best.indices[:, 0], back, confidence)
        if self.nms is None:
            return i, j, score
        plane = confidence.new_full((size.numel(),), -1.0)
        plane = plane.index_put((places,), confidence.detach()).view(1, 1, *size)
        window = {"kernel_size": self.nms, "stride": 1, "padding": self.nms // 2}
        _, largest = F.max_pool2d(plane, return_indices=True, **window)
        keep = largest.flatten()[places[i]] == places[i]
        return i[keep], j[keep], score[keep]

    def _inner(self, mask: Tensor) -> Tensor:
        """(B, HW): the places of the image that are not at its edge."""
        height, width = mask.any(2).sum(1), mask.any(1).sum(1)
        row, column = (torch.arange(n, device=mask.device) for n in mask.shape[1:])
        inside = lambda at, end: (at >= self.border) & (at < end[:, None] - self.border)  # noqa: E731
        return (inside(row, height)[:, :, None] & inside(column, width)[:, None]).flatten(1)

    def _check(self, x, y, x_mask, y_mask) -> None:
        check_features("x", x)
        check_features("y", y)
        if x.dim() != 4 or y.dim() != 4 or x.shape[:2] != y.shape[:2]:
            raise ValueError(
                "x and y must be (B, D, H, W) and (B, D, H', W'), got "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        for name, mask, features in (("x_mask", x_mask, x), ("y_mask", y_mask, y)):
            if mask is None:
                continue
            if mask.dtype != torch.bool:
                raise TypeError(f"{name} must be bool, got {mask.dtype}")
            shape = (len(features), *features.shape[2:])
            if mask.shape != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(mask.shape)}")

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, threshold={self.threshold}, "
            f"border={self.border}, nms={self.nms}"
        )


def _full(x: Tensor) -> Tensor:
    return torch.ones(len(x), *x.shape[2:], dtype=torch.bool, device=x.device)
