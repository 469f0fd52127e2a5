"""OSBORN: couplings by POT, entropies by loops, the greedy search by trying all ensembles."""

import itertools
import math

import pytest
import torch

import weft
from weft.nn.transferability import SourceScore, conditional_entropy
from weft.ops.registration import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole solutions are not for an interpreter")


def samples(seed: int, n: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    features = torch.randn(n, 4, dtype=torch.float64, generator=generator) + labels[:, None]
    return features, labels


def test_source_is_the_coupling_and_its_label_joint():
    ot = pytest.importorskip("ot")
    (xs, ys), (xt, yt) = samples(0, 20), samples(1, 15)
    found = weft.nn.TransferabilityScore(epsilon=0.2).source(xs, ys, xt, yt)
    C = ot.dist(xs.numpy(), xt.numpy())
    P = ot.sinkhorn([], [], C, 0.2 * C.mean(), stopThr=1e-12)
    assert abs(float(found.domain_difference) - (P * C).sum()) < 1e-4
    joint = [[sum(P[i, j] for i in range(20) for j in range(15)
                  if ys[i] == k and yt[j] == l) for l in range(3)] for k in range(3)]  # fmt: skip
    entropy = -sum(p * math.log(p / sum(row)) for row in joint for p in row)
    assert abs(float(found.task_difference) - entropy) < 1e-4


def test_conditional_entropy_of_known_joints():
    eye = torch.eye(4, dtype=torch.float64)
    assert float(conditional_entropy(eye)) == 0
    assert abs(float(conditional_entropy(torch.ones_like(eye))) - math.log(4)) < 1e-12


def test_cohesiveness():
    """0 for models that agree up to names; for independent ones, the entropies of both."""
    first = torch.arange(12) % 3
    predictions = torch.stack([first, (first + 1) % 3, torch.arange(12) // 3 % 4])
    pairs = weft.nn.TransferabilityScore.cohesiveness(predictions)
    assert abs(float(pairs[0, 1])) < 1e-12
    assert abs(float(pairs[0, 2]) - math.log(3) - math.log(4)) < 1e-12


def test_greedy_and_diminishing_returns():
    generator = torch.Generator().manual_seed(0)
    sources = [SourceScore(*torch.rand(2, generator=generator)) for _ in range(6)]
    pairs = torch.rand(6, 6, generator=generator)
    pairs = (pairs + pairs.mT).fill_diagonal_(0)
    rule = weft.nn.TransferabilityScore((0.5, 1.0, 0.3))
    found = rule.greedy(3, sources, pairs)
    members: list[int] = []
    for _ in range(3):
        members.append(
            max(
                set(range(6)) - set(members),
                key=lambda m: rule.score([*members, m], sources, pairs),
            )
        )
    assert found.members == members
    by_hand = -sum(0.5 * sources[m][0] + sources[m][1] for m in members)
    by_hand = by_hand - 0.3 * sum(pairs[i, j] for i, j in itertools.combinations(members, 2))
    assert abs(found.scores[-1] - float(by_hand)) < 1e-6
    gain = lambda S, m: rule.score([*S, m], sources, pairs) - rule.score(S, sources, pairs)  # noqa: E731
    for small in itertools.combinations(range(5), 2):
        assert gain(small, 5) >= gain((*small, *(set(range(5)) - set(small))), 5) - 1e-9
