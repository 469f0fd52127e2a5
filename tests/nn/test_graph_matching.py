"""Second-order matching: the products against loops, the relaxation against all permutations."""

import itertools

import pytest
import torch

import weft
from weft.nn.graph_matching import adjacency, edge_agreement
from weft.ops.registration import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole solutions are not for an interpreter")


def views(n: int, D: int = 4, noise: float = 0.1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, D, dtype=torch.float64, generator=generator)
    return x, x + noise * torch.randn(n, D, dtype=torch.float64, generator=generator)


def test_edge_agreement_is_the_double_sum():
    x, y = views(5)
    generator = torch.Generator().manual_seed(1)
    P, A, B = (torch.rand(5, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i, k, j, l in itertools.product(range(5), repeat=4):
        expected[i, k] += A[i, j] * B[k, l] * P[j, l] * ((x[i] - x[j]) @ (y[k] - y[l]))
    torch.testing.assert_close(edge_agreement(x, y, P, A, B), expected)


def test_small_epsilon_finds_the_best_permutation():
    x, y = views(5, noise=0.3)
    order = torch.tensor([3, 0, 4, 1, 2])
    y = y[order]
    loss = weft.nn.EntropicGraphMatchingLoss(2, epsilon=0.02, steps=5)
    found = loss.matching(x, y).argmax(1)
    x, y = (torch.nn.functional.normalize(t, dim=1) for t in (x, y))
    graphs = adjacency(x, 2), adjacency(y, 2)

    def objective(permutation):
        P = torch.eye(5, dtype=torch.float64)[list(permutation)]
        return float((P * (x @ y.mT + edge_agreement(x, y, P, *graphs) / 4)).sum())

    assert tuple(found.tolist()) == max(itertools.permutations(range(5)), key=objective)


def test_loss_and_its_gradient():
    x, y = views(12)
    loss = weft.nn.EntropicGraphMatchingLoss(3)
    assert 0 <= float(loss(x, x)) < 0.1
    assert float(loss(x, y.roll(1, 0))) > 0.8
    leaf = y.clone().requires_grad_()
    before = loss(x, leaf)
    before.backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
    assert float(loss(x, y - 0.05 * leaf.grad / leaf.grad.norm())) < float(before.detach())


def test_bad_input():
    loss = weft.nn.EntropicGraphMatchingLoss(3)
    with pytest.raises(ValueError, match="x and y must be"):
        loss(torch.ones(4, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="more than k"):
        loss(torch.rand(3, 2), torch.rand(3, 2))
