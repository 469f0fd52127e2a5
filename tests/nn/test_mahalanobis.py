"""Mahalanobis distances against explicit inverses and densities, CAFA's loss by hand."""

import pytest
import torch

from weft.nn import ClassStatistics, MahalanobisHead, class_aware_alignment_loss
from weft.ops.cases import randn


def gaussians(C=4, D=5, shared=False):
    mean = randn(C, D, dtype=torch.float64)
    a = randn(C, D, 2 * D, dtype=torch.float64, seed=1)
    covariance = a @ a.mT / (2 * D)
    return mean, covariance[0] if shared else covariance


@pytest.mark.parametrize("shared", [True, False])
def test_distances_are_by_the_inverse(shared):
    mean, covariance = gaussians(shared=shared)
    head = MahalanobisHead(mean, covariance, ridge=0.1)
    x = randn(2, 3, 5, dtype=torch.float64, seed=2)
    distances = head.distances(x)
    for c in range(4):
        sigma = covariance if shared else covariance[c]
        inverse = torch.linalg.inv(sigma + 0.1 * torch.eye(5, dtype=torch.float64))
        difference = x - mean[c]
        expected = torch.einsum("...i,ij,...j->...", difference, inverse, difference)
        torch.testing.assert_close(distances[..., c], expected)
    torch.testing.assert_close(head(x), -distances / 2)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_and_empty_batches(shared):
    head = MahalanobisHead(*gaussians(shared=shared))
    x = randn(3, 5, dtype=torch.float64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(head, x) and torch.autograd.gradgradcheck(head, x)
    assert head(x[:0]).shape == (0, 4)


def test_discriminant_analysis():
    """With one covariance, softmax of the logits is the posterior of the Gaussians."""
    mean, covariance = gaussians(shared=True)
    x = randn(6, 5, dtype=torch.float64, seed=3)
    density = torch.stack(
        [torch.distributions.MultivariateNormal(m, covariance).log_prob(x) for m in mean], -1
    )
    posterior = MahalanobisHead(mean, covariance)(x).softmax(-1)
    torch.testing.assert_close(posterior, density.softmax(-1))


@pytest.mark.parametrize("kind", ["shared", "class"])
def test_head_of_statistics(kind):
    x, labels = randn(60, 3, dtype=torch.float64), torch.arange(60) % 4
    statistics = ClassStatistics(3, 4, kind, dtype=torch.float64)
    for part in range(0, 60, 7):
        statistics.update(x[part : part + 7], labels[part : part + 7])
    head = MahalanobisHead.from_statistics(statistics, ddof=0)
    groups = [x[labels == c] for c in range(4)]
    covariances = torch.stack([torch.cov(g.mT, correction=0) for g in groups])
    covariance = covariances.mean(0) if kind == "shared" else covariances
    expected = MahalanobisHead(torch.stack([g.mean(0) for g in groups]), covariance)
    torch.testing.assert_close(head(x), expected(x))


def test_alignment_loss_by_hand():
    distances = torch.tensor([[1.0, 3.0, 4.0], [2.0, 5.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    expected = torch.tensor([3 / 8, 2 / 8], dtype=torch.float64).log().mean()
    torch.testing.assert_close(class_aware_alignment_loss(distances, labels), expected)
    nearest = torch.tensor([1 / 8, 1 / 8], dtype=torch.float64).log().mean()
    torch.testing.assert_close(class_aware_alignment_loss(distances), nearest)
    assert class_aware_alignment_loss(distances[:0]) == 0


def test_alignment_pulls_features_to_their_class():
    head = MahalanobisHead(*gaussians())
    x = randn(16, 5, dtype=torch.float64, seed=4)
    labels = head.distances(x).argmin(1)
    shifted = (x + 0.5).requires_grad_()
    assert (head(shifted).argmax(1) == labels).float().mean() < 0.8
    adam = torch.optim.Adam([shifted], lr=0.02)
    for _ in range(200):
        adam.zero_grad()
        class_aware_alignment_loss(head.distances(shifted), labels).backward()
        adam.step()
    assert (head(shifted).argmax(1) == labels).all()


@pytest.mark.parametrize(
    "match, make",
    [
        ("covariance", lambda: MahalanobisHead(torch.ones(2, 3), torch.ones(2, 2))),
        ("positive definite", lambda: MahalanobisHead(torch.ones(2, 3), -torch.eye(3))),
        ("ridge", lambda: MahalanobisHead(torch.ones(2, 3), torch.eye(3), ridge=-1)),
        ("statistics", lambda: MahalanobisHead.from_statistics(ClassStatistics(3, 2))),
        ("sample", lambda: MahalanobisHead.from_statistics(ClassStatistics(3, 2, "class"))),
        ("x must be", lambda: MahalanobisHead(torch.ones(2, 3), torch.eye(3))(torch.ones(2, 4))),
        ("distances", lambda: class_aware_alignment_loss(torch.ones(3))),
        ("labels", lambda: class_aware_alignment_loss(torch.ones(1, 2), torch.tensor([2]))),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
