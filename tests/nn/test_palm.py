"""PALMLoss against its steps as the published code takes them, in float64."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import MahalanobisHead, PALMLoss
from weft.ops.cases import randn

CLASSES, K, D = 3, 4, 6
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 0])


def sinkhorn(z, prototypes):
    Q = (z.detach() @ prototypes.detach().T / 0.05).exp().T
    Q = Q / Q.sum()
    for _ in range(3):
        Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
        Q = Q / Q.sum(0, keepdim=True) / Q.shape[1]
    return (Q * Q.shape[1]).T


def published(features, labels, prototypes, of, top, momentum):
    z = F.normalize(features, dim=1)
    mask = (labels[:, None] == of).double()
    update = mask * sinkhorn(z, prototypes)
    keep = torch.zeros_like(update).scatter(1, update.topk(top, 1).indices, 1)
    update = F.normalize(F.normalize(keep * update, dim=1, p=1), dim=0, p=1)
    prototypes = F.normalize(momentum * prototypes + (1 - momentum) * update.T @ z, dim=1)
    keep = torch.zeros_like(update).scatter(1, update.topk(top, 1).indices, 1)
    weights = F.normalize(keep * mask * sinkhorn(z, prototypes), dim=1, p=1)
    logits = z @ prototypes.detach().T / 0.1
    mle = -((weights * logits).sum(1) - logits.exp().sum(1).log()).mean()
    contrast = 0
    for i, anchor in enumerate(prototypes):
        others = [j for j in range(len(of)) if j != i]
        s = {j: anchor @ prototypes[j] / 0.5 for j in others}
        positives = [s[j] for j in others if of[j] == of[i]]
        contrast -= sum(positives) / len(positives) - torch.stack(list(s.values())).logsumexp(0)
    return mle + contrast / len(of), prototypes.detach()


@pytest.mark.parametrize("top", [1, 3, 4])
def test_steps_are_the_published_ones(top):
    torch.manual_seed(0)
    loss = PALMLoss(D, CLASSES, K, top=top, momentum=0.7).double()
    for step in range(3):
        features = randn(10, D, seed=step, dtype=torch.float64).requires_grad_()
        before = loss.prototypes.clone()
        expected, after = published(
            features, LABELS, before, loss.prototype_labels, top, momentum=0.7
        )
        found = loss(features, LABELS)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(loss.prototypes, after)
        slopes = [torch.autograd.grad(value, features)[0] for value in (found, expected)]
        torch.testing.assert_close(*slopes)


def test_evaluation_leaves_the_prototypes():
    loss = PALMLoss(D, CLASSES, K, top=2).eval()
    before = loss.prototypes.clone()
    assert loss(randn(10, D), LABELS).isfinite()
    assert torch.equal(loss.prototypes, before)


def test_mahalanobis_distance_tells_what_is_new():
    torch.manual_seed(0)
    train = F.normalize(randn(300, D) * torch.tensor([3.0, 3, 3, 3, 0.1, 0.1]), dim=1)
    head = MahalanobisHead(train.mean(0, keepdim=True), train.T.cov())
    new = F.normalize(randn(50, D, seed=1) * torch.tensor([0.1, 0.1, 0.1, 0.1, 3, 3]), dim=1)
    assert head.distances(new).min() > head.distances(train).max()


def test_refuses():
    loss = PALMLoss(D, CLASSES, K, top=2)
    for match, call in {
        "top must be <= prototypes": lambda: PALMLoss(D, CLASSES, 3, top=4),
        "momentum must be in": lambda: PALMLoss(D, CLASSES, momentum=1.5),
        "temperature must be > 0": lambda: PALMLoss(D, CLASSES, temperature=0.0),
        "proto_weight must be >= 0": lambda: PALMLoss(D, CLASSES, proto_weight=-1.0),
        "labels must be in": lambda: loss(randn(2, D), torch.tensor([0, 3])),
        "features must be": lambda: loss(randn(2, D + 1), LABELS[:2]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
