"""VisualWords and VisualWordPredictor against the published code's formulas in float64."""

import copy

import pytest
import torch
from torch.nn import functional as F

from weft.nn import VisualWordPredictor, VisualWords
from weft.nn import visual_words as module
from weft.ops.cases import randn

B, D, H, W, K = 3, 4, 6, 5, 8


def published(features, vocabulary, mean_distance, momentum, training):
    """BoWExtractor.forward: distances by a convolution."""
    features = features[:, :, 1:-1, 1:-1]
    kernels = -2 * vocabulary[:, :, None, None]
    d = features.pow(2).sum(1, keepdim=True)
    d = d + F.conv2d(features, kernels, vocabulary.pow(2).sum(1))
    if training:
        mean_distance = momentum * mean_distance + (1 - momentum) * d.min(1).values.mean()
    codes = F.softmax(-15 / mean_distance * d, dim=1)
    return F.normalize(codes.flatten(2).max(2).values, p=1, dim=1), mean_distance


@pytest.mark.parametrize("pairs", [module.PAIRS_AT_A_TIME, 100])
def test_bags_are_the_published_ones(pairs, monkeypatch):
    monkeypatch.setattr(module, "PAIRS_AT_A_TIME", pairs)
    torch.manual_seed(0)
    layer = VisualWords(K, D, momentum=0.9, dtype=torch.float64)
    mean_distance = torch.tensor(0.5).double()
    for step in range(4):
        features = randn(B, D, H, W, dtype=torch.float64, seed=step)
        before, first = layer.vocabulary.clone(), int(layer.oldest)
        expected, mean_distance = published(features, before, mean_distance, 0.9, True)
        torch.testing.assert_close(layer(features), expected)
        torch.testing.assert_close(layer.mean_distance, mean_distance)
        renewed = [(first + b) % K for b in range(B)]
        inner = features[:, :, 1:-1, 1:-1]
        for b, word in enumerate(renewed):
            means = inner[b].unfold(1, 3, 1).unfold(2, 3, 1).mean((3, 4)).flatten(1).mT
            assert (means - layer.vocabulary[word]).abs().amax(1).min() < 1e-12
        kept = [k for k in range(K) if k not in renewed]
        assert torch.equal(layer.vocabulary[kept], before[kept])
    layer.eval()
    state = copy.deepcopy(layer.state_dict())
    features = randn(B, D, 3, 3, dtype=torch.float64)
    expected, _ = published(features, layer.vocabulary, mean_distance, 0.9, False)
    torch.testing.assert_close(layer(features), expected)
    assert all(torch.equal(state[name], t) for name, t in layer.state_dict().items())
    assert layer(features[:0]).shape == (0, K)
    torch.testing.assert_close(layer(features.half()).sum(1), torch.ones(B).double())


def test_predictor():
    torch.manual_seed(0)
    layer = VisualWordPredictor(D, 6, kappa=5.0, dtype=torch.float64)
    features = randn(B, 6, dtype=torch.float64).requires_grad_()
    vocabulary = randn(K, D, dtype=torch.float64, seed=1)
    first, norm, _, last = layer.generator
    hidden = F.normalize(vocabulary, dim=1) @ first.weight.mT
    variance = hidden.var(0, unbiased=False)
    hidden = (hidden - hidden.mean(0)) / (variance + norm.eps).sqrt()
    weights = F.normalize(hidden.relu() @ last.weight.mT + last.bias, dim=1)
    torch.testing.assert_close(layer(features, vocabulary), 5 * features @ weights.mT)
    assert first.weight.shape == (12, D)
    target = torch.rand(B, K).double().softmax(1)
    ours = F.cross_entropy(layer(features, vocabulary), target)
    published = F.kl_div(layer(features, vocabulary).log_softmax(1), target, reduction="batchmean")
    entropy = torch.special.entr(target).sum(1).mean()
    torch.testing.assert_close(ours, published + entropy)


def test_refuses():
    layer, x = VisualWords(K, D), randn(B, D, H, W)
    for match, make in [
        ("num_words", lambda: VisualWords(0, D)),
        ("sharpness must be", lambda: VisualWords(K, D, sharpness=0.0)),
        ("momentum must be", lambda: VisualWords(K, D, momentum=1.0)),
        ("features must be", lambda: layer(x[:, :2])),
        ("H, W >= 5", lambda: layer(x[:, :, :4])),
        ("at most 8 maps", lambda: layer(randn(9, D, H, W))),
        ("kappa must be", lambda: VisualWordPredictor(D, 6, kappa=0.0)),
        ("vocabulary must be", lambda: VisualWordPredictor(D, 6)(randn(B, 6), randn(K, 3))),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
