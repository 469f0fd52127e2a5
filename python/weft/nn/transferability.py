"""How well an ensemble of source models will transfer to a target, before any training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weft.ops.pairwise.distance import pairwise_distance
from weft.ops.transport.sinkhorn import sinkhorn


class SourceScore(NamedTuple):
    """Of one source model; both are smaller for a source that is closer to the target."""

    domain_difference: Tensor  # ⟨P, C⟩
    task_difference: Tensor  # H(Y_t | Y_s), in nats


class Ensemble(NamedTuple):
    """The models that a greedy search has chosen, in its order, and the score of each prefix."""

    members: list[int]
    scores: list[float]


def conditional_entropy(joint: Tensor) -> Tensor:
    """H(column | row) = −Σ J_kl log(J_kl / Σ_l J_kl) of joint masses (..., K, L), in nats."""
    joint = joint / joint.sum((-2, -1), keepdim=True)
    rows = joint.sum(-1, keepdim=True)
    return -torch.xlogy(joint, joint / torch.where(rows > 0, rows, 1)).sum((-2, -1))


class TransferabilityScore:
    r"""OSBORN: an ensemble's transferability from optimal transport, and its greedy selection.

    A source model m is judged by the coupling P of its features of source samples with its features
    of target samples (squared Euclidean cost):

    .. math::
        W_D = \langle P, C \rangle, \qquad W_T = H(Y_t \mid Y_s) \text{ under }
        J_{kl} = \sum_{i: y_i = k,\, j: y_j = l} P_{ij}

    and two models by how little the predictions of one tell of those of the other on the target,
    :math:`W_C(m, n) = H(\hat Y_m \mid \hat Y_n) + H(\hat Y_n \mid \hat Y_m)`. An ensemble S scores

    .. math::
        -\sum_{m \in S} (w_D W_D + w_T W_T) - w_C \sum_{m < n \in S} W_C(m, n)

    larger being better: a sum over models minus penalties of pairs, which is submodular, so that
    adding the best model first, then the best with it, is the usual approximation.

    Args:
        weights: (w_D, w_T, w_C) ≥ 0. The paper adds the three as they are, though their units
            differ.
        epsilon: of the coupling, in units of the mean cost.

    Source: Vimal K B et al., "Building a Winning Team: Selecting Source Model Ensembles using a
    Submodular Transferability Estimation Approach", ICCV 2023: domain difference, task difference
    and cohesiveness; the first two are those of Tan et al., "OTCE: A Transferability Metric for
    Cross-Domain Cross-Task Representations", CVPR 2021, equations 3 to 6. Section 4 asks for low
    disagreement; how its pairs are summed is our reading. Its text describes W_T as the entropy of
    the source's labels given the target's; that of OTCE, which it follows, is the one here.
    """

    def __init__(
        self, weights: tuple[float, float, float] = (1.0, 1.0, 1.0), *, epsilon: float = 0.1
    ):
        if len(weights) != 3 or not all(w >= 0 for w in weights):
            raise ValueError(f"weights must be three numbers ≥ 0, got {weights}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be > 0, got {epsilon}")
        self.weights, self.epsilon = weights, epsilon

    def source(
        self,
        source_features: Tensor,
        source_labels: Tensor,
        target_features: Tensor,
        target_labels: Tensor,
    ) -> SourceScore:
        """Domain and task difference of one model.

        Args:
            source_features, target_features: ``(n, D)`` and ``(m, D)``, by this model.
            source_labels, target_labels: ``(n,)`` and ``(m,)`` int64 ≥ 0.
        """
        if len(source_features) != len(source_labels) or len(target_features) != len(target_labels):
            raise ValueError("source_labels and target_labels must have one label for each feature")
        C = pairwise_distance(source_features, target_features)
        found = sinkhorn(C, epsilon=self.epsilon * C.mean().clamp_min(1e-30))
        counts = int(source_labels.max()) + 1, int(target_labels.max()) + 1
        joint = found.plan_label_joint(source_labels, target_labels, *counts)
        return SourceScore((found.plan * C).sum(), conditional_entropy(joint))

    @staticmethod
    def cohesiveness(predictions: Tensor) -> Tensor:
        """W_C of all pairs, ``(models, models)``, from predicted classes ``(models, m)`` int64."""
        models, count = predictions.shape
        classes = int(predictions.max()) + 1
        one_hot = torch.nn.functional.one_hot(predictions, classes).double()
        joint = torch.einsum("amk,bml->abkl", one_hot, one_hot) / count
        one_way = conditional_entropy(joint)
        return one_way + one_way.mT

    def score(self, members: Sequence[int], sources: list[SourceScore], pairs: Tensor) -> float:
        """Of the ensemble ``members``; ``pairs`` is what ``cohesiveness`` gives."""
        w_domain, w_task, w_pairs = self.weights
        alone = sum(
            w_domain * float(sources[m].domain_difference)
            + w_task * float(sources[m].task_difference)
            for m in members
        )
        inside = pairs[list(members)][:, list(members)]
        return -alone - w_pairs * float(inside.triu(1).sum())

    def greedy(self, size: int, sources: list[SourceScore], pairs: Tensor) -> Ensemble:
        """``size`` models, each the best beside those before it."""
        if not 0 < size <= len(sources) or pairs.shape != (len(sources),) * 2:
            raise ValueError(
                f"size must be in [1, {len(sources)}] and pairs a square matrix of all models, "
                f"got {size} and {tuple(pairs.shape)}"
            )
        members: list[int] = []
        scores: list[float] = []
        for _ in range(size):
            left = [m for m in range(len(sources)) if m not in members]
            score, best = max((self.score([*members, m], sources, pairs), -m) for m in left)
            members.append(-best)
            scores.append(score)
        return Ensemble(members, scores)
