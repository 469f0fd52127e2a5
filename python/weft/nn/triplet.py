"""Triplet losses, with the triplets mined in the batch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weft.nn.checks import at_least_float32, check_features, check_label_vector, full_precision
from weft.ops.pairwise.distance import pairwise_distance

MINING = ("semihard", "hard", "all")
PAIRS_AT_A_TIME = 1 << 20


class TripletLoss(nn.Module):
    r"""Pulls an anchor towards samples of its label, away from those of other labels, by a margin.

    .. math::
        \ell_{apn} = [\, d(x_a, x_p) - d(x_a, x_n) + m \,]_+, \qquad
        y_a = y_p \ne y_n, \; a \ne p

    ``mining`` says which triplets count; the loss is their mean, and 0 (with gradient 0) if there
    is none.

    ========  =====================================================================================
    semihard  for each pair (a, p) the nearest n that is farther than p, if it is within the margin:
              d(a, p) < d(a, n) < d(a, p) + m; FaceNet's choice
    hard      for each anchor its farthest p and its nearest n ("batch hard")
    all       all triplets whose loss is positive ("batch all")
    ========  =====================================================================================

    Distances are formed for a block of anchors at a time and never kept: memory grows with the
    number of chosen triplets times D, for "all" with the block. Ties go to the lowest index.

    Args:
        margin: m, >= 0; > 0 for semihard, which is otherwise empty.
        mining: semihard, hard or all.
        squared: d is the squared distance, as in FaceNet; else the distance, whose gradient at
            distance 0 is 0.
        normalize: divide the features by their norms first, as FaceNet does.

    Shapes: features ``(N, D)``, labels ``(N,)`` int64, loss ``()`` in the dtype of the features.

    Raises:
        ValueError: an unknown mining, a margin out of range, shapes that do not match.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR
    2015, equations 3 and 4; hard and all: Hermans et al., "In Defense of the Triplet Loss for
    Person Re-Identification", 2017, equations 5 and 7.
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        mining: str = "semihard",
        squared: bool = True,
        normalize: bool = True,
    ):
        super().__init__()
        if mining not in MINING:
            raise ValueError(f"mining must be one of {', '.join(MINING)}, got {mining!r}")
        if not margin >= 0 or (mining == "semihard" and margin == 0):
            bound = "> 0" if mining == "semihard" else ">= 0"
            raise ValueError(f"margin must be {bound}, got {margin}")
        self.margin, self.mining = float(margin), mining
        self.squared, self.normalize = squared, normalize

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        check_features("x", x)
        if x.dim() != 2:
            raise ValueError(f"x must be (N, D), got {tuple(x.shape)}")
        check_label_vector("labels", labels, x)
        with full_precision(x):
            wide = at_least_float32(x)
            wide = F.normalize(wide, dim=1) if self.normalize else wide
            if self.mining == "all":
                return self._all(wide, labels).to(x.dtype)
            anchor, positive, negative = mine_triplets(
                wide, labels, self.margin, mining=self.mining, squared=self.squared
            )
            near = self._distance(wide[anchor], wide[positive])
            far = self._distance(wide[anchor], wide[negative])
            losses = (near - far + self.margin).clamp(min=0)
            return (losses.sum() / max(len(losses), 1) + nan_of(wide)).to(x.dtype)

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        square = (x - y).square().sum(-1)
        return square if self.squared else safe_root(square)

    def _all(self, x: Tensor, labels: Tensor) -> Tensor:
        total, count = x.sum() * 0, 0
        for rows in blocks(x):
            weights, number = self._counts(x, labels, rows)
            part = checkpoint(self._weighted, x, rows, weights, use_reentrant=False)
            total, count = total + part + self.margin * number, count + number
        return total / torch.as_tensor(count, device=x.device).clamp(min=1) + nan_of(x)

    def _weighted(self, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return (weights * distances(x, rows, self.squared)).sum()

    @torch.no_grad()
    def _counts(self, x: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How often each distance of the anchors ``rows`` is added in the positive losses, less
        how often it is subtracted; and how many losses are positive.

        Those of a pair (a, p) have the negatives below d(a, p) + m, those with a negative the
        positives above d(a, n) - m: two searches among sorted distances.
        """
        positive, negative = kinds(labels, rows)
        distance = distances(x, rows, self.squared)
        near, far = nearest_of(distance, positive)[0], nearest_of(distance, negative)[0]
        threshold = near + self.margin
        added = torch.searchsorted(far, (distance + self.margin).contiguous())
        above = torch.searchsorted(threshold, distance.contiguous(), right=True)
        subtracted = positive.sum(1, keepdim=True) - above
        weights = torch.where(positive, added, 0) - torch.where(negative, subtracted, 0)
        return weights.to(x.dtype), torch.where(positive, added, 0).sum()

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining!r}, squared={self.squared}"


@torch.no_grad()
def mine_triplets(
    x: Tensor, labels: Tensor, margin: float, *, mining: str = "semihard", squared: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (anchor, positive, negative), three ``(T,)`` int64, of the triplets that the mining
    "semihard" or "hard" of :class:`TripletLoss` chooses among ``x`` ``(N, D)``."""
    found = [torch.empty(3, 0, dtype=torch.int64, device=x.device)]
    for rows in blocks(x):
        positive, negative = kinds(labels, rows)
        distance = distances(x, rows, squared)
        pick = _semihard if mining == "semihard" else _hard
        anchor, near, far = pick(distance, positive, negative, margin)
        found.append(torch.stack([rows[anchor], near, far]))
    anchor, positive, negative = torch.cat(found, 1)
    return anchor, positive, negative


def _hard(distance, positive, negative, margin):
    near = distance.masked_fill(~positive, -torch.inf)
    far = distance.masked_fill(~negative, torch.inf)
    anchor = (positive.any(1) & negative.any(1)).nonzero()[:, 0]
    return anchor, near.argmax(1)[anchor], far.argmin(1)[anchor]


def _semihard(distance, positive, negative, margin):
    near, positives = nearest_of(distance, positive)
    far, negatives = nearest_of(distance, negative)
    if not far.shape[1]:
        return (torch.empty(0, dtype=torch.int64, device=distance.device),) * 3
    first = torch.searchsorted(far, near, right=True).clamp(max=far.shape[1] - 1)
    away = far.gather(1, first)
    kept = (near < away) & (away < near + margin)
    anchor, _ = kept.nonzero(as_tuple=True)
    return anchor, positives[kept], negatives.gather(1, first)[kept]


def nearest_of(distance: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """The distances of one kind in rising order and their columns, as wide as the most that a row
    has; infinity behind."""
    most = int(kind.sum(1).max())
    values, columns = distance.masked_fill(~kind, torch.inf).sort(dim=1, stable=True)
    return values[:, :most].contiguous(), columns[:, :most]


def blocks(x: Tensor) -> list[Tensor]:
    """The indices of the anchors, some at a time."""
    N = len(x)
    return list(torch.arange(N, device=x.device).split(max(1, PAIRS_AT_A_TIME // N))) if N else []


def nan_of(x: Tensor) -> Tensor:
    """NaN if one is in x, else 0: comparisons would leave such samples out of the triplets."""
    return (x.detach() * 0).sum()


def kinds(labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For the anchors ``rows``: which samples are positives, which are negatives."""
    same = labels[rows][:, None] == labels
    return same.scatter(1, rows[:, None], False), ~same


def distances(x: Tensor, rows: Tensor, squared: bool) -> Tensor:
    """Distances of the anchors ``rows`` to all samples."""
    return pairwise_distance(x[rows], x, "sqeuclidean" if squared else "euclidean")


def safe_root(square: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
