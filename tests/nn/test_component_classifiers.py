"""Classification by components: loops over the formula, bounds, training."""

import math

import pytest
import torch

from weft.nn import RBFClassifier, probability_margin_loss
from weft.ops.cases import randn


@pytest.mark.parametrize("squared", [True, False])
def test_probabilities_are_the_formula(squared):
    torch.manual_seed(0)
    head = RBFClassifier(3, 2, 4, width=2.0, squared=squared).double()
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
                distance = (x[b] - head.prototypes[k]).norm().item() ** (1 + squared)
                d = math.exp(-distance / math.exp(head.log_width[k].item()))
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


@pytest.mark.parametrize("squared", [True, False])
def test_gradients(squared):
    head = RBFClassifier(3, 2, 4, squared=squared).double()
    x = randn(5, 3, dtype=torch.float64).requires_grad_()
    run = lambda x, *p: torch.func.functional_call(head, dict(zip(names, p, strict=True)), x)  # noqa: E731
    names, parameters = zip(*head.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_distance_has_a_gradient_at_a_prototype():
    head = RBFClassifier(3, 2, 4, squared=False)
    x = head.prototypes.detach().clone().requires_grad_()
    head(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("squared", [True, False])
def test_far_from_all_components(squared):
    head = RBFClassifier(3, 2, 4, squared=squared)
    x, labels = torch.full((2, 3), 1e4), torch.tensor([0, 1])
    assert not head.detection(x).any()
    assert head.log_stretch(x, labels).isfinite().all()
    radius = head.certified_radius(x, labels)
    assert radius.isfinite().all() and torch.equal(radius > 0, head(x).argmax(1) == labels)


def test_stretch_is_the_root_of_the_worst_case():
    """The lead under detection probabilities that are all as bad as t allows, by bisection."""
    torch.manual_seed(0)
    head = RBFClassifier(3, 4, 5, width=3.0).double()
    with torch.no_grad():
        head.reasoning.normal_(0, 1.5)
    x, labels = randn(8, 3, dtype=torch.float64), torch.arange(8) % 4
    present, absent = head.reasoning_probabilities().detach()
    result = head.log_stretch(x, labels)

    def lead(d, y, c, t):
        coefficient = (present - absent)[:, y] - (present - absent)[:, c]
        up = present[:, y] * d / t - absent[:, y] * d * t - present[:, c] * d * t
        worst = up + absent[:, c] * d / t
        assert t != 1 or torch.allclose(worst, coefficient * d)
        return (worst + absent[:, y] - absent[:, c]).sum().item()

    for b in range(8):
        d, y = head.detection(x[b : b + 1])[0].detach(), labels[b].item()
        roots = []
        for c in set(range(4)) - {y}:
            low, high = -20.0, 20.0
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if lead(d, y, c, math.exp(middle)) > 0 else (low, middle)
            roots.append(low)
        assert result[b].item() == pytest.approx(min(roots), abs=1e-9)
    right = head(x).argmax(1) == labels
    assert torch.equal(result > 0, right)


@pytest.mark.parametrize("squared", [True, False])
def test_no_attack_within_the_certified_radius_succeeds(squared):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = 2 * torch.eye(3)[labels] @ randn(3, 4) + 0.2 * randn(60, 4, seed=1)
    head = RBFClassifier(4, 3, 6, width=4.0, squared=squared)
    adam = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        adam.zero_grad()
        (0.5 - head.log_stretch(x, labels)).clamp(min=0).mean().backward()
        adam.step()
    right = head(x).argmax(1) == labels
    radius = head.certified_radius(x, labels)
    assert right.float().mean() > 0.95 and torch.equal(radius > 0, right)
    assert radius.median() > 0.05
    moved = x.clone()
    for step in range(40):
        moved.requires_grad_()
        probabilities = head(moved)
        own = probabilities.gather(1, labels[:, None])[:, 0]
        others = probabilities.scatter(1, labels[:, None], -1).amax(1)
        (gradient,) = torch.autograd.grad((others - own).sum(), moved)
        direction = torch.nn.functional.normalize(gradient, dim=1)
        offset = moved.detach() + radius[:, None] * direction * (0.5 if step else 1) - x
        length = offset.norm(dim=1, keepdim=True).clamp(min=1e-12)
        moved = x + offset * (0.999 * radius[:, None] / length).clamp(max=1)
        assert (head(moved).argmax(1) == labels)[right].all()


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
