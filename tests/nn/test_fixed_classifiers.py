"""Simplex and ETF heads against their vertices, built as matrices."""

import numpy as np
import pytest
import torch

from weft.nn import ETFClassifier, SimplexClassifier
from weft.ops.cases import randn


def vertices(d):
    """The published construction, in float64: e_i and alpha 1, centred, normalised."""
    t = np.vstack([np.eye(d), np.full((1, d), (1 - np.sqrt(1 + d)) / d)])
    t -= t.mean(0)
    return t / np.linalg.norm(t, axis=1, keepdims=True)


def etf_gram(C):
    return C / (C - 1) * torch.eye(C, dtype=torch.float64) - 1 / (C - 1)


@pytest.mark.parametrize("d", [1, 2, 3, 17, 1023])
def test_simplex_is_the_published_matrix(d):
    head = SimplexClassifier(d + 1)
    expected = torch.from_numpy(vertices(d))
    torch.testing.assert_close(head.weight, expected, rtol=1e-12, atol=1e-12)
    x = randn(2, 3, d, dtype=torch.float64)
    torch.testing.assert_close(head(x), x @ expected.mT, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(head.weight @ head.weight.mT, etf_gram(d + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_simplex_is_as_accurate_as_the_product(dtype):
    d = 255
    x = (randn(64, d) + 3).to(dtype)
    w = torch.from_numpy(vertices(d))
    truth = x.double() @ w.mT
    error = (SimplexClassifier(d + 1)(x).double() - truth).abs().max()
    plain = ((x @ w.to(dtype).mT).double() - truth).abs().max()
    assert error <= max(2 * plain, 2 * torch.finfo(dtype).eps * truth.abs().max())


def test_simplex_gradient():
    head = SimplexClassifier(6)
    x = randn(4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(head, x) and torch.autograd.gradgradcheck(head, x)


def test_classes_of_the_future_keep_their_place():
    """Features trained on three of five classes by the cross entropy over all five go to the three
    vertices, and each class's features do not move as a fourth class is trained."""
    head = SimplexClassifier(5).double()

    def train(features, labels):
        features = features.clone().requires_grad_()
        sgd = torch.optim.SGD([features], lr=0.5)
        for _ in range(3000):
            sgd.zero_grad()
            loss = torch.nn.functional.cross_entropy(head(features), labels)
            (loss + 1e-3 * features.square().sum()).backward()
            sgd.step()
        return features.detach()

    three = train(0.1 * randn(3, 4, dtype=torch.float64), torch.arange(3))
    cosine = torch.nn.functional.normalize(three, dim=1) @ head.weight.mT
    torch.testing.assert_close(
        cosine.diagonal(), torch.ones(3, dtype=torch.float64), rtol=0.01, atol=0.01
    )
    four = train(torch.cat([three, 0.1 * randn(1, 4, dtype=torch.float64)]), torch.arange(4))
    angle = torch.nn.functional.cosine_similarity(four[:3], three)
    assert angle.min() > 0.999


@pytest.mark.parametrize("C, D", [(2, 1), (5, 4), (5, 9), (10, 64)])
def test_etf_gram(C, D):
    head = ETFClassifier(D, C, dtype=torch.float64)
    torch.testing.assert_close(head.weight @ head.weight.mT, etf_gram(C))
    x = randn(3, D, dtype=torch.float64)
    torch.testing.assert_close(head(x), x @ head.weight.mT)
    unit = x / x.norm(dim=1, keepdim=True)
    scaled = ETFClassifier(D, C, scale=7.0, normalize=True, dtype=torch.float64)
    torch.testing.assert_close(scaled(x), 7 * unit @ scaled.weight.mT)


def test_etf_without_rotation_is_the_simplex_of_the_first_coordinates():
    head = ETFClassifier(9, 5, rotation=None, scale=2.0)
    assert not head.state_dict()
    x = randn(3, 9, dtype=torch.float64)
    expected = 2 * x[:, :4] @ torch.from_numpy(vertices(4)).mT
    torch.testing.assert_close(head(x), expected)


def test_etf_orientations_are_uniform():
    """No direction is preferred: the mean of many random weights is 0, sign by sign."""
    torch.manual_seed(0)
    head = ETFClassifier(4, 3, dtype=torch.float64)
    total = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(4000):
        head.reset_parameters()
        total += head.weight
    assert (total / 4000).abs().max() < 0.04  # four standard errors of 1 / sqrt(4 * 4000)


@pytest.mark.parametrize(
    "match, make",
    [
        ("num_classes", lambda: SimplexClassifier(1)),
        ("x must be", lambda: SimplexClassifier(4)(torch.ones(2, 4))),
        ("num_classes", lambda: ETFClassifier(4, 6)),
        ("num_classes", lambda: ETFClassifier(4, 1)),
        ("scale", lambda: ETFClassifier(4, 3, scale=0)),
        ("rotation", lambda: ETFClassifier(4, 3, rotation="none")),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
