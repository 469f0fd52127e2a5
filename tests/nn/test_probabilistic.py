"""ProbabilisticEmbeddingLoss against the published code's sums, one pair at a time in float64."""

import pytest
import torch

from weft.nn import ProbabilisticEmbeddingLoss
from weft.nn import probabilistic as module
from weft.ops.cases import randn

N, J, D = 4, 3, 5


def published(x, y, a, b, x_log_variance, y_log_variance, uniform, beta):
    """soft_contrastive_nll, uniform_loss and kl_divergence of the authors' code."""

    def nll(first, second, matched):
        d = torch.sqrt(((first[None] - second[:, None]) ** 2).sum(-1) + 1e-6).flatten()
        s = -a * d + b
        inner = s * matched - torch.stack([s, -s]).logsumexp(0)
        return -inner.logsumexp(0) + torch.tensor(float(len(d))).log()

    total = 0
    for first, second in ((x, y), (y, x)):
        for i in range(N):
            for j in range(N):
                total = total + nll(first[i], second[j], 1 if i == j else -1)
    z = torch.cat([x.reshape(-1, D), y.reshape(-1, D)])
    uniformity = torch.pdist(z).pow(2).mul(-2).exp().mean().log()
    kl = 0
    for mean, v in ((x.mean(1), x_log_variance), (y.mean(1), y_log_variance)):
        kl = kl - 0.5 * (1 + v - mean.pow(2) - v.exp()).sum()
    return total + uniform * uniformity + beta * kl, total, uniformity, kl


@pytest.mark.parametrize("pairs", [module.PAIRS_AT_A_TIME, 50])
def test_is_the_published_one(pairs, monkeypatch):
    monkeypatch.setattr(module, "PAIRS_AT_A_TIME", pairs)
    x, y = (0.3 * randn(N, J, D, dtype=torch.float64, seed=s) for s in (0, 1))
    v, w = (randn(N, D, dtype=torch.float64, seed=s) for s in (2, 3))
    layer = ProbabilisticEmbeddingLoss(3.0, 2.0, uniformity=0.5, kl=0.1).double()
    inputs = [*(t.requires_grad_() for t in (x, y, v, w)), *layer.parameters()]
    expected = published(x, y, layer.scale, layer.shift, v, w, 0.5, 0.1)
    terms = layer(x, y, v, w)
    for ours, wanted in zip(terms, expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    ours, wanted = (torch.autograd.grad(t, inputs) for t in (terms.loss, expected[0]))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_match_probability():
    x, y = randn(4, 3, 5, dtype=torch.float64), randn(6, 2, 5, dtype=torch.float64, seed=1)
    layer = ProbabilisticEmbeddingLoss(3.0, 6.0).double()
    logits = 6 - 3 * ((x[:, :, None, None] - y).square().sum(-1) + 1e-6).sqrt()
    expected = (logits.exp() / (logits.exp() + (-logits).exp())).mean((1, 3))
    torch.testing.assert_close(layer.match_probability(x, y), expected)
    assert layer.match_probability(x[:0], y).shape == (0, 6)


def test_far_pairs_do_not_underflow():
    x = torch.zeros(2, 1, 2)
    y = torch.tensor([[[0.0, 0.0]], [[1000.0, 0.0]]])
    loss = ProbabilisticEmbeddingLoss()(x, y).loss
    assert loss.isfinite() and loss > 2 * 2 * 15 * 900
    assert ProbabilisticEmbeddingLoss()(x.bfloat16(), y.bfloat16()).loss.dtype == torch.float32


def test_refuses():
    x = randn(N, J, D)
    for match, make in [
        ("scale must be", lambda: ProbabilisticEmbeddingLoss(0.0)),
        ("uniformity and kl", lambda: ProbabilisticEmbeddingLoss(kl=-1.0)),
        ("x and y must be", lambda: ProbabilisticEmbeddingLoss()(x[0], x[0])),
        ("x and y must be of one shape", lambda: ProbabilisticEmbeddingLoss()(x, x[:2])),
        ("x_log_variance must be", lambda: ProbabilisticEmbeddingLoss(kl=1.0)(x, x)),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
