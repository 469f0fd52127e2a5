"""Classification by components: loops over the formula, bounds, training."""

import math

import pytest
import torch

from weft.nn import RBFClassifier, probability_margin_loss
from weft.ops.cases import randn


def test_probabilities_are_the_formula():
    torch.manual_seed(0)
    head = RBFClassifier(3, 2, 4, width=2.0).double()
    with torch.no_grad():
        head.log_width += 0.3 * randn(4, dtype=torch.float64)
    x = randn(5, 3, dtype=torch.float64)
    result = head(x)
    for b in range(5):
        for c in range(2):
            weights = head.reasoning[:, :, c].exp()
            present, absent = weights / weights.sum()
            total = 0.0
            for k in range(4):
                squared = (x[b] - head.prototypes[k]).square().sum().item()
                d = math.exp(-squared / math.exp(head.log_width[k].item()))
                total += d * present[k].item() + (1 - d) * absent[k].item()
            assert result[b, c].item() == pytest.approx(total, rel=1e-9)


def test_probabilities_are_probabilities():
    head = RBFClassifier(8, 5, 6)
    x = torch.cat([3 * randn(50, 8), head.prototypes.detach()])
    assert 0 <= head(x).min() and head(x).max() <= 1
    torch.testing.assert_close(head.reasoning_probabilities().sum((0, 1)), torch.ones(5))
    torch.testing.assert_close(head.detection(head.prototypes).diagonal(), torch.ones(6))


def test_learns_with_the_margin_loss():
    torch.manual_seed(0)
    labels = torch.arange(90) % 3
    x = 2 * torch.eye(3)[labels] @ randn(3, 4) + 0.2 * randn(90, 4, seed=1)
    head = RBFClassifier(4, 3, 6, width=4.0)
    adam = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(200):
        adam.zero_grad()
        probability_margin_loss(head(x), labels).backward()
        adam.step()
    assert (head(x).argmax(1) == labels).float().mean() > 0.95


def test_gradients():
    head = RBFClassifier(3, 2, 4).double()
    x = randn(5, 3, dtype=torch.float64).requires_grad_()
    run = lambda x, *p: torch.func.functional_call(head, dict(zip(names, p, strict=True)), x)  # noqa: E731
    names, parameters = zip(*head.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_margin_loss_by_hand():
    probabilities = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.4, 0.35], [0.1, 0.8, 0.3]])
    labels = torch.tensor([0, 1, 2])
    loss = probability_margin_loss(probabilities, labels, 0.3)
    assert loss.item() == pytest.approx((0.0 + 0.25 + 0.8) / 3)
    assert probability_margin_loss(probabilities[:0], labels[:0]) == 0


@pytest.mark.parametrize(
    "match, make",
    [
        ("num_prototypes", lambda: RBFClassifier(3, 2, 0)),
        ("width", lambda: RBFClassifier(3, 2, 4, width=0.0)),
        ("x must be", lambda: RBFClassifier(3, 2, 4)(torch.ones(2, 4))),
        ("probabilities", lambda: probability_margin_loss(torch.ones(2, 1), torch.zeros(2).long())),
        ("margin", lambda: probability_margin_loss(torch.ones(1, 2), torch.tensor([0]), 2.0)),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
