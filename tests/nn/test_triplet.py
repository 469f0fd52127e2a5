"""TripletLoss against loops over all triplets."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import TripletLoss
from weft.nn import triplet as module
from weft.ops.cases import randn

LABELS = torch.tensor([0, 1, 0, 2, 1, 1, 0, 3, 2, 1, 0, 2])


def by_loops(x, labels, margin, mining, squared, normalize):
    """The definition, one triplet at a time."""
    x = F.normalize(x, dim=1) if normalize else x
    N = len(x)
    d = [[(x[i] - x[j]).square().sum() for j in range(N)] for i in range(N)]
    if not squared:
        d = [[value.sqrt() if value > 0 else value * 0 for value in row] for row in d]
    losses = []
    for a in range(N):
        positives = [p for p in range(N) if p != a and labels[p] == labels[a]]
        negatives = [n for n in range(N) if labels[n] != labels[a]]
        if mining == "hard" and positives and negatives:
            near = max(d[a][p] for p in positives)
            far = min(d[a][n] for n in negatives)
            losses.append((near - far + margin).clamp(min=0))
        for p in positives:
            if mining == "semihard":
                inside = [d[a][n] for n in negatives if d[a][p] < d[a][n] < d[a][p] + margin]
                if inside:
                    losses.append(d[a][p] - min(inside) + margin)
            if mining == "all":
                all_of = [d[a][p] - d[a][n] + margin for n in negatives]
                losses += [loss for loss in all_of if loss > 0]
    return torch.stack(losses).mean() if losses else (x * 0).sum()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("mining", ["semihard", "hard", "all"])
@pytest.mark.parametrize("margin", [0.05, 0.3, 2.0])
def test_against_loops(mining, squared, normalize, margin, monkeypatch):
    x = randn(12, 5, dtype=torch.float64).requires_grad_()
    x.data[4] = x.data[1]  # a repeated point: distance 0 and ties
    options = {"mining": mining, "squared": squared, "normalize": normalize}
    expected = by_loops(x, LABELS, margin, **options)
    (wanted,) = torch.autograd.grad(expected, x)
    for pairs in (module.PAIRS_AT_A_TIME, 30):  # one block, and blocks of two anchors
        monkeypatch.setattr(module, "PAIRS_AT_A_TIME", pairs)
        loss = TripletLoss(margin, **options)(x, LABELS)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)


@pytest.mark.parametrize("mining", ["semihard", "hard", "all"])
def test_no_triplet_no_loss(mining):
    for N, labels in [(4, [0, 0, 0, 0]), (4, [0, 1, 2, 3]), (1, [0]), (0, [])]:
        x = randn(N, 3).requires_grad_()
        loss = TripletLoss(mining=mining)(x, torch.tensor(labels, dtype=torch.int64))
        loss.backward()
        assert loss == 0 and not x.grad.any()


@pytest.mark.parametrize("mining", ["semihard", "hard", "all"])
def test_a_nan_is_seen(mining):
    x = randn(12, 5)
    x[3, 2] = torch.nan
    assert TripletLoss(mining=mining)(x, LABELS).isnan()


def test_half_precision_is_computed_in_float32():
    x = randn(12, 5).bfloat16()
    loss = TripletLoss(0.3)(x, LABELS)
    assert loss.dtype == torch.bfloat16
    assert loss == TripletLoss(0.3)(x.float(), LABELS).bfloat16()


@pytest.mark.parametrize("squared", [True, False])
def test_semihard_separates_classes(squared):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = randn(3, 8)[labels] + randn(60, 8, seed=1)
    mapping = torch.nn.Linear(8, 4)
    optimizer = torch.optim.Adam(mapping.parameters(), 0.05)
    criterion = TripletLoss(squared=squared)
    for _ in range(40):
        optimizer.zero_grad()
        criterion(mapping(x), labels).backward()
        optimizer.step()
    z = F.normalize(mapping(x), dim=1)
    nearest = torch.cdist(z, z).fill_diagonal_(9).argmin(1)
    assert (labels[nearest] == labels).float().mean() > 0.9


@pytest.mark.parametrize(
    "match, make",
    [
        ("mining must be one of", lambda: TripletLoss(mining="easy")),
        ("margin must be > 0", lambda: TripletLoss(0.0)),
        ("margin must be >= 0", lambda: TripletLoss(-1.0, mining="hard")),
        ("x must be", lambda: TripletLoss()(torch.ones(2, 2, 2), LABELS)),
        ("labels must be", lambda: TripletLoss()(torch.ones(3, 2), LABELS)),
        ("labels must be an int64", lambda: TripletLoss()(torch.ones(12, 2), LABELS.float())),
    ],
)
def test_refuses(match, make):
    with pytest.raises((ValueError, TypeError), match=match):
        make()
