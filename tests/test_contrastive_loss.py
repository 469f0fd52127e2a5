"""contrastive_loss against the published formulas in float64, and the edges it promises."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, running
from torch.nn import functional as F

import weft
from weft.ops.cases import randn
from weft.ops.pairwise import cross_entropy as op


def rows(N, D=7, seed=0, dtype=torch.float64):
    return F.normalize(randn(N, D, dtype=dtype, seed=seed), dim=1).requires_grad_()


def same(found, expected, *leaves):
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (found, expected)
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infonce_and_clip(implementation):
    x, y = rows(13), rows(13, seed=1)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    s, diagonal = x @ y.mT / temperature, torch.arange(13)
    with running(implementation):
        one = weft.contrastive_loss(x, y, temperature=temperature)
        same(one, F.cross_entropy(s, diagonal), x, y, temperature)
        both = weft.contrastive_loss(x, y, temperature=temperature, symmetric=True)
        expected = (F.cross_entropy(s, diagonal) + F.cross_entropy(s.mT, diagonal)) / 2
        same(both, expected, x, y, temperature)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_both_sides_when_all_rows_do_not_fit(implementation, monkeypatch):
    monkeypatch.setattr(op, "ROW_BYTES", 0)
    test_infonce_and_clip(implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_views(implementation):
    """NT-Xent as SimCLR writes it: the logits of a row without its own."""
    x = rows(12)
    s = (x @ x.mT / 0.5).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    with running(implementation):
        found = weft.contrastive_loss(x, temperature=0.5)
        same(found, F.cross_entropy(s, (torch.arange(12) + 6) % 12), x)


def khosla(z, labels, temperature):
    """Equation 2, a loop over anchors and positives."""
    total, anchors = 0, 0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if not positives:
            continue
        anchors += 1
        denominator = torch.stack([z[i] @ z[a] / temperature for a in others]).logsumexp(0)
        of_positives = [z[i] @ z[p] / temperature - denominator for p in positives]
        total = total - sum(of_positives) / len(positives)
    return total / anchors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_supcon_is_equation_2(implementation):
    z, labels = rows(11), torch.tensor([0, 0, 1, 2, 0, 3, 1, 4, 4, 0, 5])
    with running(implementation):
        found = weft.contrastive_loss(z, kind="supcon", labels=labels, temperature=0.3)
        same(found, khosla(z, labels, 0.3), z)
        each = weft.contrastive_loss(
            z, kind="supcon", labels=labels, temperature=0.3, reduction="none"
        )
    assert not each[torch.tensor([3, 5, 10])].any()
    torch.testing.assert_close(each.sum() / 8, found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_anchor_has_a_positive(implementation):
    z = rows(4)
    with running(implementation):
        loss = weft.contrastive_loss(z, kind="supcon", labels=torch.arange(4), temperature=0.3)
        assert loss == 0 and not torch.autograd.grad(loss, z)[0].any()
        assert weft.contrastive_loss(z[:0], z, temperature=1.0) == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_siglip(implementation):
    x, y = rows(9), rows(9, seed=1)
    t, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, -10.0))
    z = 2 * torch.eye(9) - 1
    expected = -F.logsigmoid(z * (x @ y.mT / t + b)).sum() / 9
    with running(implementation):
        found = weft.contrastive_loss(x, y, kind="sigmoid", temperature=t, bias=b)
        same(found, expected, x, y, t, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks_and_positives_of_a_regression(implementation):
    """ConR's pairs: near targets are positives, near predictions with far targets negatives."""
    z, y = rows(14), randn(14, dtype=torch.float64, seed=4)
    predicted = y + 0.5 * randn(14, dtype=torch.float64, seed=5)
    near = (y[:, None] - y).abs() < 0.5
    negatives = ((predicted[:, None] - predicted).abs() < 0.5) & ~near
    weights = torch.linspace(0.2, 2, 14, dtype=torch.float64)
    total, anchors = 0, 0
    for i in range(14):
        positives = near[i] & (torch.arange(14) != i)
        if positives.any():
            anchors += 1
            s = z[i] @ z.mT / 0.4
            lse = s[positives | negatives[i]].logsumexp(0)
            total = total + weights[i] * (lse - s[positives]).mean()
    with running(implementation):
        found = weft.contrastive_loss(
            z, kind="supcon", positives=near, mask=negatives, weights=weights, temperature=0.4
        )
        same(found, total / anchors, z)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_negatives_masked(implementation):
    """The positive alone is left: loss 0; what is masked is not read."""
    x, y = rows(5), rows(8, seed=1)
    spoiled = torch.cat([y[:5], torch.full_like(y[5:], torch.nan)])
    with running(implementation):
        nothing = torch.zeros(5, 8, dtype=torch.bool)
        found = weft.contrastive_loss(x, spoiled, temperature=0.1, mask=nothing)
        assert found == 0
        mask = torch.ones(5, 8, dtype=torch.bool)
        mask[:, 5:] = False
        found = weft.contrastive_loss(x, spoiled, temperature=0.1, mask=mask)
        same(found, weft.contrastive_loss(x, y[:5], temperature=0.1), x)
        assert weft.contrastive_loss(x, spoiled, temperature=0.1).isnan()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits(implementation, symmetric):
    x, y = rows(16), rows(16, seed=1)
    with running(implementation):
        found = weft.contrastive_loss(x, y, temperature=1e-4, symmetric=symmetric)
    s, diagonal = x @ y.mT / 1e-4, torch.arange(16)
    expected = F.cross_entropy(s, diagonal)
    if symmetric:
        expected = (expected + F.cross_entropy(s.mT, diagonal)) / 2
    same(found, expected, x, y)


def test_weights_get_a_gradient():
    x, y = rows(6), rows(6, seed=1)
    weights = torch.rand(6, dtype=torch.float64).requires_grad_()
    loss = weft.contrastive_loss(x, y, temperature=0.2, weights=weights)
    each = weft.contrastive_loss(x, y, temperature=0.2, reduction="none")
    same(loss, (weights * each).mean(), x, y, weights)
    assert torch.autograd.gradcheck(
        lambda w: weft.contrastive_loss(x, y, temperature=0.2, weights=w, symmetric=True), weights
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_temperature_and_bias_twice(implementation):
    x, y = rows(4, 3), rows(5, 3, seed=1)
    scalars = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, -0.3)]

    def loss(x, y, t, b):
        return weft.contrastive_loss(x, y, kind="sigmoid", temperature=t, bias=b)

    with running(implementation):
        assert torch.autograd.gradcheck(loss, (x, y, *scalars))
        assert torch.autograd.gradgradcheck(loss, (x, y, *scalars))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_sides_of_many_rows(implementation):
    """More rows and columns than one group of tiles."""
    x, y = rows(2300, 9, dtype=torch.float32), rows(2300, 9, 1, dtype=torch.float32)
    with running(implementation):
        found = weft.contrastive_loss(x, y, temperature=0.1, symmetric=True)
        grads = torch.autograd.grad(found, (x, y))
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    s, diagonal = wide[0] @ wide[1].mT / 0.1, torch.arange(2300)
    truth = (F.cross_entropy(s, diagonal) + F.cross_entropy(s.mT, diagonal)) / 2
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)
    for one, two in zip(grads, torch.autograd.grad(truth, wide), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=1e-5 * float(two.abs().max()))


def test_autocast():
    x, y = rows(16, dtype=torch.float32), rows(16, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = weft.contrastive_loss(x, y, temperature=0.5)
    exact = weft.contrastive_loss(x, y, temperature=0.5)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
