"""Clusters of equal size, and SubclassBalancingLoss against loops over its formula."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import SubclassBalancingLoss, sinkhorn_clusters
from weft.ops.cases import randn

LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
SUBCLASSES = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 5])


@pytest.mark.parametrize("N, K", [(12, 3), (13, 3), (50, 7), (5, 5), (9, 1)])
def test_sizes_differ_by_at_most_one(N, K):
    sizes = sinkhorn_clusters(randn(N, 4), K).bincount(minlength=K)
    assert sizes.sum() == N and (sizes == N // K + 1).sum() == N % K
    assert sizes.min() == N // K


def test_separate_groups_are_found():
    centers = torch.linalg.qr(randn(8, 8)).Q[:5]
    groups = torch.arange(60) % 5
    x = centers[groups] + 0.1 * randn(60, 8, seed=1)
    found = sinkhorn_clusters(x, 5)
    assert len({(int(a), int(b)) for a, b in zip(found, groups, strict=True)}) == 5


def test_sizes_bound_what_a_dense_group_takes():
    """40 samples of one direction and 8 of another: four clusters of 12."""
    x = torch.eye(4)[torch.tensor([0] * 40 + [1] * 8)] + 0.05 * randn(48, 4)
    found = sinkhorn_clusters(x, 4)
    assert (found.bincount() == 12).all()
    assert len(found[40:].unique()) == 1


def by_loops(x, temperatures, beta):
    z = F.normalize(x, dim=1)
    N, total = len(x), 0
    for i in range(N):
        others = [j for j in range(N) if j != i]
        mates = [j for j in others if SUBCLASSES[j] == SUBCLASSES[i]]
        far = [j for j in others if j not in mates]
        family = [j for j in far if LABELS[j] == LABELS[i]]
        for positives, among, tau, weight in (
            (mates, others, 0.1, 1.0),
            (family, far, temperatures[i], beta),
        ):
            s = {j: z[i] @ z[j] / tau for j in among}
            lse = torch.stack(list(s.values())).logsumexp(0)
            for p in positives:
                total -= weight * (s[p] - lse) / len(positives) / N
    return total


def test_loss_is_the_formula():
    x = randn(12, 5, dtype=torch.float64).requires_grad_()
    own = torch.linspace(0.1, 0.4, 12, dtype=torch.float64)
    for temperatures in (None, own):
        found = SubclassBalancingLoss(beta=0.3)(x, LABELS, SUBCLASSES, temperatures)
        expected = by_loops(x, own * 0 + 0.2 if temperatures is None else own, 0.3)
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad(value, x)[0] for value in (found, expected)]
        torch.testing.assert_close(*slopes)


def test_refuses():
    x = randn(12, 5)
    for match, call in {
        "N >= 13": lambda: sinkhorn_clusters(x, 13),
        "steps must be >= 0": lambda: sinkhorn_clusters(x, 2, steps=-1),
        "temperature must be > 0": lambda: SubclassBalancingLoss(0.0),
        "beta must be >= 0": lambda: SubclassBalancingLoss(beta=-1.0),
        "temperatures must be": lambda: SubclassBalancingLoss()(x, LABELS, SUBCLASSES, x),
        "subclasses must be": lambda: SubclassBalancingLoss()(x, LABELS, SUBCLASSES[:3]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
