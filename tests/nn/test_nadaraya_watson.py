"""NadarayaWatsonHead against the published code's softmax over the whole support, in float64."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import NadarayaWatsonHead
from weft.ops.cases import randn

LABELS = torch.tensor([2, 0, 0, 3, 2, 2, 0, 3, 0])  # class 1 has no support
SCORES = {
    "euclidean": lambda x, s: -torch.linalg.vector_norm(x[:, None] - s, dim=2),
    "sqeuclidean": lambda x, s: -(x[:, None] - s).square().sum(2),
    "cosine": lambda x, s: F.normalize(x, dim=1) @ F.normalize(s, dim=1).mT,
    "dot": lambda x, s: x @ s.mT,
}


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("metric", SCORES)
def test_is_the_published_one(metric, temperature):
    x = randn(5, 4, dtype=torch.float64).requires_grad_()
    support = randn(9, 4, dtype=torch.float64, seed=1).requires_grad_()
    weights = (SCORES[metric](x, support) / temperature).softmax(1)
    expected = torch.log(weights @ F.one_hot(LABELS, 4).double() + 1e-12)
    out = NadarayaWatsonHead(4, metric, temperature=temperature)(x, support, LABELS)
    torch.testing.assert_close(out, expected)
    target = torch.tensor([0, 2, 1, 3, 0])
    inputs = (x, support)
    ours = torch.autograd.grad(F.nll_loss(out, target), inputs)
    wanted = torch.autograd.grad(F.nll_loss(expected, target), inputs)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_far_supports_still_vote():
    """Weights that underflow one by one have the right ratio."""
    x, support = torch.zeros(1, 2), torch.tensor([[300.0, 0.0], [0.0, 301.0]])
    labels = torch.tensor([0, 1])
    out = NadarayaWatsonHead(2, eps=0.0)(x, support, labels)
    torch.testing.assert_close(out, torch.tensor([[0.0, -1.0]]).log_softmax(1))


def test_shapes_and_half_precision():
    head = NadarayaWatsonHead(4)
    support = randn(9, 4, seed=1)
    assert head(randn(2, 3, 4), support, LABELS).shape == (2, 3, 4)
    assert head(randn(0, 4), support, LABELS).shape == (0, 4)
    out = head(randn(2, 4).bfloat16(), support.bfloat16(), LABELS)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.exp().sum(1), torch.ones(2))


def test_a_trained_map_classifies():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = randn(3, 8)[labels] + randn(60, 8, seed=1)
    mapping, head = torch.nn.Linear(8, 4), NadarayaWatsonHead(3)
    optimizer = torch.optim.Adam(mapping.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        z = mapping(x)
        F.nll_loss(head(z[::2], z[1::2], labels[1::2]), labels[::2]).backward()
        optimizer.step()
    z = mapping(x).detach()
    assert (head(z[::2], z[1::2], labels[1::2]).argmax(1) == labels[::2]).float().mean() > 0.95


@pytest.mark.parametrize(
    "match, make",
    [
        ("num_classes", lambda: NadarayaWatsonHead(0)),
        ("metric must be", lambda: NadarayaWatsonHead(4, "l1")),
        ("temperature must be", lambda: NadarayaWatsonHead(4, temperature=0.0)),
        ("eps must be", lambda: NadarayaWatsonHead(4, eps=-1.0)),
        ("x must be", lambda: NadarayaWatsonHead(4)(randn(2, 3), randn(9, 4), LABELS)),
        ("support must be", lambda: NadarayaWatsonHead(4)(randn(2, 4), randn(0, 4), LABELS[:0])),
        ("support_labels must be", lambda: NadarayaWatsonHead(3)(randn(2, 4), randn(9, 4), LABELS)),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
