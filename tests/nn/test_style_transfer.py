"""PAMA's losses by loops and its module by plain PyTorch, in float64."""

import pytest
import torch
from torch.nn import functional as F

import weft
from weft.nn import (
    ManifoldAlignment,
    moment_matching_loss,
    relaxed_earth_mover_distance,
    self_similarity_loss,
)
from weft.ops.cases import randn


def sets(B=2, N=7, M=5, D=4):
    x, y = randn(B, N, D, dtype=torch.float64), randn(B, M, D, dtype=torch.float64, seed=1)
    return x.requires_grad_(), y.requires_grad_()


def check(found, expected, leaves):
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def cost(p, q):
    return 1 - F.cosine_similarity(p, q, 0)


def test_relaxed_earth_mover_distance():
    x, y = sets()
    expected = []
    for one, two in zip(x, y, strict=True):
        there = sum(min(cost(p, q) for q in two) for p in one) / len(one)
        back = sum(min(cost(p, q) for p in one) for q in two) / len(two)
        expected.append(torch.maximum(there, back))
    check(relaxed_earth_mover_distance(x, y), torch.stack(expected), (x, y))
    torch.testing.assert_close(relaxed_earth_mover_distance(x[0], y[0]), expected[0])
    swapped = relaxed_earth_mover_distance(y, x)
    torch.testing.assert_close(swapped, torch.stack(expected))
    torch.testing.assert_close(relaxed_earth_mover_distance(x, 3 * x), torch.zeros(2).double())


def test_relaxed_earth_mover_distance_is_cold_conditional_transport():
    x, y = (t[0].detach() for t in sets())
    there, back = (
        weft.conditional_transport(x[None], y[None], rho=rho, temperature=1e-6)[0]
        for rho in (1.0, 0.0)
    )
    torch.testing.assert_close(relaxed_earth_mover_distance(x, y), torch.maximum(there, back))


def test_moment_matching():
    x, y = sets()
    expected = []
    for one, two in zip(x, y, strict=True):
        means = (one.mean(0) - two.mean(0)).abs().mean()
        expected.append(means + (torch.cov(one.T) - torch.cov(two.T)).abs().mean())
    check(moment_matching_loss(x, y), torch.stack(expected), (x, y))


def test_self_similarity():
    x = sets()[0]
    y = randn(2, 7, 3, dtype=torch.float64, seed=2).requires_grad_()
    expected = []
    for one, two in zip(x, y, strict=True):
        terms = [
            (cost(one[i], one[j]) - cost(two[i], two[j])).abs() for i in range(7) for j in range(7)
        ]
        expected.append(sum(terms) / len(terms))
    torch.testing.assert_close(self_similarity_loss(x, y), torch.stack(expected))
    rotation = torch.linalg.qr(randn(4, 4, dtype=torch.float64)).Q
    assert self_similarity_loss(x, 2 * x @ rotation).max() < 1e-12


def published(layer, content, style):
    """The attention and the fusion with their matrices stored and maps padded by hand."""
    reflect = lambda x, n: F.pad(x, (n, n, n, n), mode="reflect")  # noqa: E731
    apply = lambda conv, x: F.conv2d(x, conv.weight, conv.bias)  # noqa: E731
    content, style = (F.relu6(apply(layer.conv_in, reflect(x, 1))) for x in (content, style))

    def normalized(x):
        deviation = (x.flatten(2).var(2) + 1e-5).sqrt()[..., None, None]
        return (x - x.flatten(2).mean(2)[..., None, None]) / deviation

    q = F.relu6(apply(layer.query, normalized(content))).flatten(2)
    k = F.relu6(apply(layer.key, normalized(style))).flatten(2)
    v = F.relu6(apply(layer.value, style)).flatten(2)
    weights = torch.softmax(q.mT @ k, -1)
    moved = (v @ weights.mT).view(*q.shape[:2], *content.shape[2:])
    moved = F.relu6(apply(layer.conv_out, reflect(F.relu6(apply(layer.out, moved)), 1)))
    both = apply(layer.joint, torch.cat((content, moved), 1))
    gates = [apply(g, reflect(both, n) if n else both) for n, g in enumerate(layer.gates)]
    w = sum(g.sigmoid() for g in gates) / 3
    return w * apply(layer.content, content) + (1 - w) * apply(layer.rearranged, moved)


def test_alignment_is_the_published_one():
    torch.manual_seed(0)
    layer = ManifoldAlignment(4, dtype=torch.float64)
    content = randn(2, 4, 3, 4, dtype=torch.float64).requires_grad_()
    style = randn(2, 4, 5, 3, dtype=torch.float64, seed=1).requires_grad_()
    found = layer(content, style)
    assert found.shape == content.shape
    leaves = [content, style, *layer.parameters()]
    check(found.sin(), published(layer, content, style).sin(), leaves)


def test_bad_arguments():
    x, y = torch.ones(2, 3), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"y must be \(\.\.\., 3\)"):
        relaxed_earth_mover_distance(x, y)
    with pytest.raises(ValueError, match="x must have at least 1 points"):
        relaxed_earth_mover_distance(x[:0], x)
    with pytest.raises(ValueError, match="y must have at least 2 points"):
        moment_matching_loss(x, x[:1])
    with pytest.raises(ValueError, match="x and y must be"):
        self_similarity_loss(x, y[:1])
    with pytest.raises(ValueError, match="channels must be even"):
        ManifoldAlignment(3)
    with pytest.raises(ValueError, match="style must have 1 maps"):
        ManifoldAlignment(2)(torch.ones(1, 2, 3, 3), torch.ones(2, 2, 3, 3))
