"""Made-up features of past classes: translated, drawn; and the classifier alignment."""

import pytest
import torch
from torch import nn

from weft.nn import (
    ClassStatistics,
    logit_normalized_cross_entropy,
    sample_class_features,
    slow_learner_groups,
    translate_features,
)
from weft.ops.cases import randn

MEANS = torch.tensor([[4.0, 0.0], [0.1, 0.1], [3.0, 0.5], [0.5, 9.0]], dtype=torch.float64)


@pytest.mark.parametrize("metric, sources", [("cosine", [2, 3]), ("euclidean", [2, 2])])
def test_translation(metric, sources):
    """Past class 1 is nearest to 2, and is as far from 2 and 3 by angle but for a tilt to 3."""
    means = MEANS.clone()
    means[1] = torch.tensor([0.1, 0.15])
    x = randn(5, 2, dtype=torch.float64)
    labels = torch.tensor([3, 2, 3, 2, 2])
    features, made = translate_features(x, labels, means, [0, 1], metric=metric)
    expected, classes = [], []
    for p, n in zip([0, 1], sources, strict=True):
        for row, label in zip(x, labels, strict=True):
            if label == n:
                expected.append(row - means[n] + means[p])
                classes.append(p)
    torch.testing.assert_close(features, torch.stack(expected))
    assert made.tolist() == classes


def test_translation_moves_the_centroid_and_nothing_else():
    x, labels = randn(50, 6, dtype=torch.float64), torch.full((50,), 2)
    means = randn(3, 6, dtype=torch.float64, seed=1)
    means[2] = x.mean(0)
    features, made = translate_features(x, labels, means, torch.tensor([0, 1]))
    assert features.shape == (100, 6) and made.tolist() == [0] * 50 + [1] * 50
    torch.testing.assert_close(features[made == 1].mean(0), means[1])
    torch.testing.assert_close(torch.cov(features[made == 0].mT), torch.cov(x.mT))
    nothing = translate_features(x, labels, means, [])
    assert nothing[0].shape == (0, 6) and nothing[1].shape == (0,)


@pytest.mark.parametrize("kind", ["class", None])
def test_drawn_features_have_the_moments_of_their_class(kind):
    torch.manual_seed(0)
    mix = randn(3, 3, 3, dtype=torch.float64)
    labels = torch.arange(600) % 3
    noise = randn(600, 3, 1, dtype=torch.float64, seed=1)
    x = (mix[labels] @ noise)[..., 0] + 5.0 * labels[:, None]
    statistics = ClassStatistics(3, 4, kind, dtype=torch.float64)
    statistics.update(x, labels)
    n = 40000
    features, made = sample_class_features(statistics, n, mean_scale=0.9, ridge=0.0)
    assert made.tolist() == [c for c in range(3) for _ in range(n)]
    for c in range(3):
        drawn, source = features[made == c], x[labels == c]
        covariance = torch.cov(source.mT)
        if kind is None:
            covariance = covariance.diagonal().diag()
        deviation = covariance.diagonal().sqrt()
        error = (drawn.mean(0) - 0.9 * source.mean(0)) / deviation
        assert error.abs().max() < 5 / n**0.5  # five standard errors
        error = (torch.cov(drawn.mT) - covariance) / torch.outer(deviation, deviation)
        assert error.abs().max() < 5 * (2 / n) ** 0.5


def test_drawing_is_repeatable_and_scales_by_class():
    statistics = ClassStatistics(2, 2, "class")
    statistics.update(randn(10, 2), torch.arange(10) % 2)
    one, two = (
        sample_class_features(statistics, 3, generator=torch.Generator().manual_seed(1))[0]
        for _ in range(2)
    )
    assert torch.equal(one, two)
    scale = torch.tensor([0.0, 2.0])
    scaled, made = sample_class_features(
        statistics, 3, mean_scale=scale, generator=torch.Generator().manual_seed(1)
    )
    shift = (scale - 1)[:, None] * statistics.mean
    torch.testing.assert_close(scaled, one + shift[made])


@pytest.mark.parametrize("sizes", [None, [2, 3]])
def test_logit_normalization(sizes):
    logits, labels = randn(4, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 1])
    total = 0.0
    for row, y in zip(logits, labels, strict=True):
        tasks = [row] if sizes is None else [row[:2], row[2:]]
        norm = sum(t.square().sum().sqrt() for t in tasks) / len(tasks) + 1e-7
        scaled = row / norm / 0.3
        total += scaled.exp().sum().log() - scaled[y]
    loss = logit_normalized_cross_entropy(logits, labels, temperature=0.3, task_sizes=sizes)
    torch.testing.assert_close(loss, total / 4)
    if sizes is None:  # magnitudes do not count
        longer = logit_normalized_cross_entropy(100 * logits, labels, temperature=0.3)
        torch.testing.assert_close(longer, loss, rtol=1e-6, atol=1e-6)


def test_slow_learner_moves_at_its_own_rate():
    backbone, head = nn.Linear(3, 3), nn.Linear(3, 2)
    backbone.bias.requires_grad_(False)
    before = [p.detach().clone() for p in (backbone.weight, head.weight)]
    sgd = torch.optim.SGD(slow_learner_groups(backbone, head, 0.1, slow=0.01), lr=0.1)
    head(backbone(randn(4, 3))).square().sum().backward()
    gradients = backbone.weight.grad.clone(), head.weight.grad.clone()
    sgd.step()
    torch.testing.assert_close(backbone.weight, before[0] - 0.001 * gradients[0])
    torch.testing.assert_close(head.weight, before[1] - 0.1 * gradients[1])
    assert len(slow_learner_groups(backbone, head, 0.1, slow=0.0)) == 1


def two(kind):
    return ClassStatistics(2, 2, kind)


ONES, ZEROS = torch.ones(2, 2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "match, make",
    [
        ("metric", lambda: translate_features(ONES, ZEROS, ONES, [1], metric="l1")),
        ("past", lambda: translate_features(ONES, ZEROS, ONES, [2])),
        ("labels", lambda: translate_features(ONES, ZEROS + 2, ONES, [1])),
        ("features", lambda: translate_features(ONES[:0], ZEROS[:0], ONES, [1])),
        ("statistics", lambda: sample_class_features(two("shared"), 1)),
        ("per_class", lambda: sample_class_features(two("class"), -1)),
        ("ridge", lambda: sample_class_features(two("class"), 1, ridge=-1)),
        ("mean_scale", lambda: sample_class_features(two("class"), 1, mean_scale=torch.ones(3))),
        ("temperature", lambda: logit_normalized_cross_entropy(ONES, ZEROS, temperature=0)),
        ("task_sizes", lambda: logit_normalized_cross_entropy(ONES, ZEROS, task_sizes=[1])),
        ("slow", lambda: slow_learner_groups([], [], 0.1, slow=2)),
        ("share", lambda: slow_learner_groups(*[nn.Linear(1, 1)] * 2, 0.1)),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
