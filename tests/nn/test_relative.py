"""Relative representations: their definition, and the transformations that they do not see."""

import pytest
import torch
from torch import nn

from weft.nn import InvarianceProduct, RelativeRepresentation
from weft.ops.cases import randn

METRICS = ("cosine", "euclidean", "l1", "linf")
X, ANCHORS = randn(8, 5, dtype=torch.float64), randn(6, 5, dtype=torch.float64, seed=1)


def by_loops(x, anchors, metric):
    def one(a, b):
        if metric == "cosine":
            return (a @ b) / (a.norm() * b.norm())
        return torch.linalg.vector_norm(a - b, {"euclidean": 2, "l1": 1}.get(metric, torch.inf))

    return torch.stack([torch.stack([one(a, b) for b in anchors]) for a in x])


@pytest.mark.parametrize("metric", METRICS)
def test_definition_and_gradients(metric):
    x, anchors = X.clone().requires_grad_(), ANCHORS.clone().requires_grad_()
    ours, expected = RelativeRepresentation(None, metric)(x, anchors), by_loops(x, anchors, metric)
    torch.testing.assert_close(ours, expected)
    upstream = randn(8, 6, dtype=torch.float64, seed=2)
    for t in (x, anchors):
        grad, wanted = (
            torch.autograd.grad((r * upstream).sum(), t, retain_graph=True)[0]
            for r in (ours, expected)
        )
        torch.testing.assert_close(grad, wanted)
    kept = RelativeRepresentation(ANCHORS, metric)
    assert torch.equal(kept(X.view(2, 4, 5)), ours.detach().view(2, 4, 6))
    assert kept.state_dict().keys() == {"anchors"}


def transformations():
    rotation = torch.linalg.qr(randn(5, 5, dtype=torch.float64, seed=3)).Q
    permutation = torch.eye(5).double()[[3, 0, 4, 1, 2]] * torch.tensor([1, -1, 1, 1, -1])
    return {
        "rotation": lambda t: t @ rotation,
        "permutation": lambda t: t @ permutation,
        "shift": lambda t: t + randn(5, dtype=torch.float64, seed=4),
        "scale": lambda t: 3 * t,
    }


UNSEEN = {
    "cosine": {"rotation", "permutation", "scale"},
    "euclidean": {"rotation", "permutation", "shift"},
    "l1": {"permutation", "shift"},
    "linf": {"permutation", "shift"},
}


@pytest.mark.parametrize("metric", METRICS)
def test_invariances_are_those_of_the_table(metric):
    layer = RelativeRepresentation(None, metric)
    before = layer(X, ANCHORS)
    for name, transform in transformations().items():
        after = layer(transform(X), transform(ANCHORS))
        assert torch.allclose(before, after) == (name in UNSEEN[metric]), name


def test_a_decoder_works_on_a_rotated_encoder():
    """Zero-shot stitching: trained behind one encoder, used behind another."""
    torch.manual_seed(0)
    labels = torch.arange(90) % 3
    samples = 2 * randn(3, 5)[labels] + 0.3 * randn(90, 5, seed=1)
    encode = transformations()
    layer, decoder = RelativeRepresentation(), nn.Linear(20, 3)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(decoder(layer(samples, samples[:20])), labels)
        loss.backward()
        optimizer.step()
    turned = encode["rotation"](samples.double()).float() * 7
    assert (decoder(layer(turned, turned[:20])).argmax(1) == labels).all()


@pytest.mark.parametrize("aggregation", ["concat", "sum", "mlp_sum"])
def test_product(aggregation):
    torch.manual_seed(0)
    layer = InvarianceProduct(6, aggregation=aggregation, anchors=ANCHORS, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    spaces = [by_loops(X, ANCHORS, metric) for metric in METRICS]
    if aggregation == "concat":
        expected = torch.cat(spaces, 1)
    else:
        expected = torch.zeros(8, 6).double()
        for part, r in zip(layer.parts, spaces, strict=True):
            norm = part if aggregation == "sum" else part[0]
            centered = r - r.mean(1, keepdim=True)
            scale = (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
            value = centered / scale * norm.weight + norm.bias
            if aggregation == "mlp_sum":
                value = torch.tanh(value @ part[1].weight.mT + part[1].bias)
            expected = expected + value
    torch.testing.assert_close(layer(X), expected)
    assert layer(X.view(2, 4, 5)).shape == (2, 4, expected.shape[1])


def test_zero_vectors_repeated_points_and_half_precision():
    x = torch.zeros(1, 5).requires_grad_()
    for metric in METRICS:
        values = RelativeRepresentation(torch.zeros(2, 5), metric)(x)
        values.sum().backward()
        assert not values.any() and not x.grad.any()
        assert RelativeRepresentation(ANCHORS.float(), metric)(X.half()).dtype == torch.float32


@pytest.mark.parametrize(
    "match, make",
    [
        ("metric must be", lambda: RelativeRepresentation(ANCHORS, "l3")),
        ("anchors must be", lambda: RelativeRepresentation(ANCHORS[0])),
        ("anchors must be given once", lambda: RelativeRepresentation()(X)),
        ("anchors must be given once", lambda: RelativeRepresentation(ANCHORS)(X, ANCHORS)),
        ("x must be", lambda: RelativeRepresentation(ANCHORS)(X[:, :4])),
        ("aggregation must be", lambda: InvarianceProduct(6, aggregation="mean")),
        ("metrics must be", lambda: InvarianceProduct(6, ["l1", "l1"])),
        ("anchors must be", lambda: InvarianceProduct(7, anchors=ANCHORS)),
        ("anchors must be", lambda: InvarianceProduct(7)(X, ANCHORS)),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
