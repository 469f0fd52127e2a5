"""Compatibility losses and measures against loops that follow their formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from weft.nn import (
    HigherOrderCompatibilityLoss,
    average_compatibility,
    backward_compatibility,
    feature_distillation_loss,
    forward_compatibility,
)
from weft.ops.cases import randn


def test_higher_order_loss_is_the_published_one():
    logits = randn(6, 4, dtype=torch.float64, seed=1)
    new, old = randn(6, 3, dtype=torch.float64, seed=2), randn(6, 3, dtype=torch.float64, seed=3)
    labels = torch.tensor([0, 1, 0, 3, 2, 1])
    weight, mu = 0.3, 4.0
    total = 0.0
    for i in range(6):
        o = old[i] / old[i].norm()
        own = mu * (o @ (new[i] / new[i].norm())).item()
        others = 0.0
        for j in range(6):
            similarity = mu * (o @ (new[j] / new[j].norm())).item()
            others += math.exp(similarity if labels[i] != labels[j] else 0.0)
        entropy = math.log(sum(math.exp(v) for v in logits[i])) - logits[i, labels[i]].item()
        total += weight * entropy + (1 - weight) * (math.log(others) - own)
    loss = HigherOrderCompatibilityLoss(weight, mu)(logits, new, old, labels)
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)


def test_higher_order_loss_moves_the_new_features_alone():
    logits, new, old = (randn(5, 3, seed=s).requires_grad_() for s in range(3))
    HigherOrderCompatibilityLoss()(logits, new, old, torch.arange(5) % 3).backward()
    assert old.grad is None and new.grad.abs().sum() > 0 and logits.grad.abs().sum() > 0


def test_higher_order_loss_of_one_class_is_finite():
    x = randn(4, 3)
    assert HigherOrderCompatibilityLoss()(x, x, x, torch.zeros(4, dtype=torch.int64)).isfinite()


def test_distillation_is_the_cosine_embedding_loss():
    new, old = randn(7, 5, dtype=torch.float64), randn(7, 5, dtype=torch.float64, seed=1)
    expected = F.cosine_embedding_loss(new, old, torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(feature_distillation_loss(new, old), expected)
    assert feature_distillation_loss(new[:0], old[:0]) == 0


def test_measures_of_a_matrix_by_hand():
    matrix = torch.tensor([[0.50, 0, 0], [0.55, 0.60, 0], [0.45, 0.60, 0.70]])
    # of three pairs (2, 1), (3, 1), (3, 2) the first alone is above its column's diagonal
    assert average_compatibility(matrix).item() == pytest.approx(1 / 3)
    assert backward_compatibility(matrix).item() == pytest.approx((-0.05 + 0.0) / 2, abs=1e-6)
    assert forward_compatibility(matrix).item() == pytest.approx((-0.05 - 0.10) / 2, abs=1e-6)
    assert average_compatibility(matrix[:1, :1]) == 1


@pytest.mark.parametrize(
    "match, make",
    [
        ("weight", lambda: HigherOrderCompatibilityLoss(1.5)),
        ("mu", lambda: HigherOrderCompatibilityLoss(0.5, 0.0)),
        ("previous", lambda: feature_distillation_loss(torch.ones(2, 3), torch.ones(2, 4))),
        ("matrix", lambda: average_compatibility(torch.ones(2, 3))),
        ("matrix", lambda: backward_compatibility(torch.ones(1, 1))),
        (
            "labels",
            lambda: HigherOrderCompatibilityLoss()(
                torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 4), torch.tensor([0, 3])
            ),
        ),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
