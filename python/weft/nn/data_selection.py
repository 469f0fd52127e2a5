"""Choosing the training data that is nearest to a target, by optimal transport."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from weft.ops.pairwise.nearest import nearest
from weft.ops.stats.whitening import whitening
from weft.ops.transport.sinkhorn import sinkhorn

COVARIANCE_EPS = 1e-5
BLUR, SCALING = 0.01, 0.5  # of the published runs of GeomLoss


class Selection(NamedTuple):
    """Candidates that were chosen.

    Attributes:
        indices: ``(n,)`` int64, ascending.
        potentials: ``(n,)``: the dual potential of each in the transport to all targets, by which
            the published code weighs them.
        distance: (), the entropic transport distance between the chosen and all targets.
    """

    indices: Tensor
    potentials: Tensor
    distance: Tensor


class TransportSelection:
    r"""TAROT: training data selected to minimise its transport distance to a target.

    Features are whitened together, so that no direction dominates, and normalised:
    :math:`\Sigma + 10^{-5} I = L L^\top`, :math:`z = L^{-1} (x - \mu)`,
    :math:`\hat z = z / \lVert z \rVert`, and the cost is their distance
    :math:`C_{ij} = \sqrt{2 - 2 \hat x_i^\top \hat y_j}`. Candidates enter in layers: the first
    layer is the nearest candidate of every target, the second the second nearest, and so on.

    - ``fixed_size(n)``: layers as long as they fit; of the one that does not, the candidates with
      the largest potentials.
    - ``minimize_distance()``: layers as long as the distance to other targets falls. Targets are
      split into folds: each fold in turn proposes candidates (those with a positive inner product),
      and the distance is that to the targets of the other folds. The result is the union.

    Args:
        mode: "converged" solves every transport problem to ``tolerance``, each starting from the
            potentials of the one before. "parity" repeats the published runs: GeomLoss's 12
            annealed, averaged updates from ε = diameter² down to 10⁻⁴, after which the marginals
            are far from met.
        epsilon: of the converged mode, in units of the cost.
        tolerance: of the marginals in the converged mode.
        folds: of ``minimize_distance``.
        seed: of the split into folds.
        whiten: False if the features are whitened already; they are normalised all the same.

    Source: Feng et al., "TAROT: Targeted Data Selection via Optimal Transport", 2024, sections 3.2
    and 3.3; layers, folds and the choice within a layer as in the published code. Its last layer in
    each fold is one that no longer lowers the distance; here the best is kept.
    """

    def __init__(
        self,
        *,
        mode: str = "converged",
        epsilon: float = 0.02,
        tolerance: float = 1e-3,
        folds: int = 10,
        seed: int = 0,
        whiten: bool = True,
    ):
        if mode not in ("converged", "parity"):
            raise ValueError(f"mode must be 'converged' or 'parity', got {mode!r}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be > 0, got {epsilon}")
        if folds < 2:
            raise ValueError(f"folds must be at least 2, got {folds}")
        self.mode, self.epsilon, self.tolerance = mode, epsilon, tolerance
        self.folds, self.seed, self.whiten = folds, seed, whiten

    def features(self, candidates: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Both, whitened together and normalised: (N, D) and (M, D)."""
        for name, x in (("candidates", candidates), ("targets", targets)):
            if x.dim() != 2 or x.shape[1] != candidates.shape[1] or not len(x):
                raise ValueError(
                    f"{name} must be (n, {candidates.shape[-1]}) with n > 0, got {tuple(x.shape)}"
                )
        both = torch.cat([candidates, targets])
        if self.whiten:
            # The published covariance divides by n and not n − 1.
            scaled = both * ((len(both) - 1) / len(both)) ** 0.5
            both = whitening(scaled, "cholesky", eps=COVARIANCE_EPS)(scaled)
        both = torch.nn.functional.normalize(both, dim=1)
        return both[: len(candidates)], both[len(candidates) :]

    def distance(
        self, x: Tensor, y: Tensor, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The transport distance between normalised features, with both potentials."""
        C = (2 - 2 * x @ y.mT).abs().sqrt()
        if self.mode == "parity":
            return annealed_transport(C, diameter(x, y))
        given = None if start is None else (x.new_zeros(len(x)), start)
        found = sinkhorn(
            C, epsilon=self.epsilon, tolerance=self.tolerance, potentials=given, max_iterations=5000
        )
        return found.value, *found.potentials

    def fixed_size(self, candidates: Tensor, targets: Tensor, size: int) -> Selection:
        """Exactly ``size`` of the candidates."""
        x, y = self.features(candidates, targets)
        if not 0 < size <= len(x):
            raise ValueError(f"size must be in [1, {len(x)}], got {size}")
        chosen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        layers = Layers(x, y)
        for number in range(len(x)):
            layer = layers.row(number).unique()
            new = layer[~chosen[layer]]
            left = size - int(chosen.sum())
            if len(new) <= left:
                chosen[new] = True
            else:
                _, f, _ = self.distance(x[new], y)
                chosen[new[f.argsort(descending=True)[:left]]] = True
            if int(chosen.sum()) == size:
                break
        return self._selected(x, y, chosen)

    def minimize_distance(self, candidates: Tensor, targets: Tensor) -> Selection:
        """As many candidates as lower the distance to targets that did not propose them."""
        x, y = self.features(candidates, targets)
        if len(y) < self.folds:
            raise ValueError(f"targets must be at least {self.folds}, one a fold, got {len(y)}")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(y), generator=generator).to(y.device)
        chosen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for fold in order.tensor_split(self.folds):
            others = torch.ones(len(y), dtype=torch.bool, device=y.device)
            others[fold] = False
            chosen |= self._best_layers(x, y[fold], y[others])
        return self._selected(x, y, chosen)

    def _best_layers(self, x: Tensor, proposing: Tensor, judging: Tensor) -> Tensor:
        chosen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        layers, best, start = Layers(x, proposing), math.inf, None
        for number in range(len(x)):
            layer = layers.row(number)[layers.values(number) > 0]
            larger = chosen.clone()
            larger[layer] = True
            if bool(larger.any()):
                value, _, start = self.distance(x[larger], judging, start)
                if float(value) >= best:
                    break
                best = float(value)
            chosen = larger
        return chosen

    def _selected(self, x: Tensor, y: Tensor, chosen: Tensor) -> Selection:
        indices = chosen.nonzero()[:, 0]
        if not len(indices):
            raise ValueError("candidates: none has a positive inner product with any target")
        value, f, _ = self.distance(x[indices], y)
        return Selection(indices, f, value)


class Layers:
    """The n-th nearest candidate of every target, searched a block of layers at a time."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y, self.found = x, y, None

    def _up_to(self, number: int):
        if self.found is None or self.found.indices.shape[1] <= number:
            k = min(max(8, 4 * number), len(self.x))
            self.found = nearest(self.y, self.x, k=max(k, number + 1), metric="dot")
        return self.found

    def row(self, number: int) -> Tensor:
        return self._up_to(number).indices[:, number]

    def values(self, number: int) -> Tensor:
        return self._up_to(number).values[:, number]


def diameter(x: Tensor, y: Tensor) -> float:
    """The diagonal of the box around both clouds, as GeomLoss measures it."""
    both = torch.cat([x, y])
    return float((both.amax(0) - both.amin(0)).norm())


def annealed_transport(C: Tensor, diameter: float) -> tuple[Tensor, Tensor, Tensor]:
    """Value and potentials after one averaged update at each ε of GeomLoss's schedule for p = 2:
    diameter², then falling by a factor of SCALING² to BLUR²."""
    first, last = 2 * math.log(diameter), 2 * math.log(BLUR)
    steps = max(0, math.ceil((last - first) / (2 * math.log(SCALING)) - 1e-9))
    schedule = [diameter**2]
    schedule += [math.exp(first + 2 * math.log(SCALING) * n) for n in range(steps)] + [BLUR**2]
    log_a, log_b = -math.log(C.shape[0]), -math.log(C.shape[1])

    def softmin(eps: float, C: Tensor, g: Tensor | float, log_weight: float) -> Tensor:
        return -eps * torch.logsumexp(log_weight + (g - C) / eps, 1)

    f = softmin(schedule[0], C, 0.0, log_b)
    g = softmin(schedule[0], C.mT, 0.0, log_a)
    for eps in schedule:
        next_f, next_g = softmin(eps, C, g, log_b), softmin(eps, C.mT, f, log_a)
        f, g = (f + next_f) / 2, (g + next_g) / 2
    eps = schedule[-1]
    f, g = softmin(eps, C, g, log_b), softmin(eps, C.mT, f, log_a)
    return f.mean() + g.mean(), f, g
