"""The contrastive losses against the published formulas in float64, with gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from weft.nn import CMCLoss, ContrastiveLoss, ConVIRTLoss, PatchNCELoss, SupConLoss
from weft.ops.cases import randn

X, Y = (randn(6, 4, dtype=torch.float64, seed=s) for s in (0, 1))


def cosines(x, y):
    return torch.stack([torch.stack([F.cosine_similarity(a, b, 0) for b in y]) for a in x])


def info_nce(x, y, temperature):
    s = (cosines(x, y) / temperature).exp()
    return -(s.diagonal() / s.sum(1)).log()


def agree(ours, expected, inputs):
    """Loss and gradients of two functions of the same inputs."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    a, b = ours(*inputs), expected(*inputs)
    torch.testing.assert_close(a, b)
    grads = zip(torch.autograd.grad(a, inputs), torch.autograd.grad(b, inputs), strict=True)
    for ours, wanted in grads:
        torch.testing.assert_close(ours, wanted)


def test_info_nce():
    agree(ContrastiveLoss(temperature=0.2), lambda x, y: info_nce(x, y, 0.2).mean(), (X, Y))
    dot = ContrastiveLoss(temperature=2.0, normalize=False)
    labels = torch.arange(6)
    agree(dot, lambda x, y: F.cross_entropy(x @ y.mT / 2, labels), (X, Y))


def simclr(x):
    """NT-Xent over a batch of two views, one anchor at a time."""
    N, s = len(x), (cosines(x, x) / 0.3).exp()
    losses = []
    for i in range(N):
        partner = (i + N // 2) % N
        others = sum(s[i, j] for j in range(N) if j != i)
        losses.append(-(s[i, partner] / others).log())
    return torch.stack(losses).mean()


def test_simclr():
    agree(ContrastiveLoss(temperature=0.3), simclr, (X,))


def test_clip_learns_its_temperature():
    layer = ContrastiveLoss(symmetric=True, learn_temperature=True, temperature=0.2).double()
    assert math.isclose(layer.log_scale.item(), math.log(5), rel_tol=1e-6)

    def clip(x, y):
        logits = layer.log_scale.exp() * F.normalize(x, dim=1) @ F.normalize(y, dim=1).mT
        labels = torch.arange(6)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2

    agree(layer, clip, (X, Y))
    ours, wanted = (torch.autograd.grad(f(X, Y), layer.log_scale)[0] for f in (layer, clip))
    torch.testing.assert_close(ours, wanted)
    with torch.no_grad():
        layer.log_scale.fill_(9)
    torch.testing.assert_close(layer(X, Y), ContrastiveLoss(temperature=0.01, symmetric=True)(X, Y))


def test_siglip():
    layer = ContrastiveLoss("sigmoid", 0.1, learn_temperature=True).double()

    def siglip(x, y):
        """Algorithm 1 of the paper."""
        logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).mT * layer.log_scale.exp()
        labels = 2 * torch.eye(6) - 1
        return -F.logsigmoid(labels * (logits + layer.bias)).sum() / 6

    agree(layer, siglip, (X, Y))
    for parameter in (layer.log_scale, layer.bias):
        ours, wanted = (torch.autograd.grad(f(X, Y), parameter)[0] for f in (layer, siglip))
        torch.testing.assert_close(ours, wanted)


def published_supcon(features, labels, temperature, base):
    """The authors' code: views of all samples one after the other, masks of pairs."""
    B, V, _ = features.shape
    mask = (labels[:, None] == labels).double()
    x = torch.cat(torch.unbind(F.normalize(features, dim=2), dim=1), dim=0)
    s = x @ x.mT / temperature
    off = 1 - torch.eye(B * V, dtype=s.dtype)
    mask = mask.repeat(V, V) * off
    log_probability = s - ((s - s.max().detach()).exp() * off).sum(1, keepdim=True).log()
    log_probability = log_probability - s.max().detach()
    count = mask.sum(1)
    mean = (mask * log_probability).sum(1) / torch.where(count < 1e-6, 1, count)
    return -(temperature / base * mean).mean()


@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcon_is_the_published_one(views):
    features = randn(7, views, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 3, 1, 0])  # with one view two rows have no positive
    layer = SupConLoss(0.1, 0.07)
    agree(
        lambda f: layer(f, labels),
        lambda f: published_supcon(f, labels, 0.1, 0.07),
        (features,),
    )
    if views == 2:
        alone = torch.arange(7)
        agree(layer, lambda f: published_supcon(f, alone, 0.1, 0.07), (features,))
        rows = features.transpose(0, 1).reshape(14, 4)
        torch.testing.assert_close(
            SupConLoss(0.1, 0.1)(features), ContrastiveLoss("infonce", 0.1)(rows)
        )


def published_patch_nce(queries, keys, temperature, together):
    """The authors' code, with the diagonal of the negatives filled by -10."""
    B, S, D = queries.shape
    q, k = F.normalize(queries, dim=2), F.normalize(keys, dim=2).detach()
    positive = (q * k).sum(2).view(-1, 1)
    if together:
        q, k = q.view(1, -1, D), k.view(1, -1, D)
    negative = q @ k.mT
    negative = negative.masked_fill(torch.eye(q.shape[1], dtype=torch.bool)[None], -10.0)
    out = torch.cat([positive, negative.flatten(0, 1)], 1) / temperature
    return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.int64))


@pytest.mark.parametrize("together", [False, True])
def test_patch_nce_is_the_published_one(together):
    keys = randn(2, 5, 4, dtype=torch.float64, seed=3).requires_grad_()
    layer = PatchNCELoss(all_negatives=together)
    agree(
        lambda q: layer(q, keys),
        lambda q: published_patch_nce(q, keys, 0.07, together),
        (randn(2, 5, 4, dtype=torch.float64),),
    )
    assert not layer(randn(2, 5, 4, dtype=torch.float64), keys).requires_grad


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.75, 1.0])
def test_convirt(weight):
    def expected(v, u):
        return (weight * info_nce(v, u, 0.1) + (1 - weight) * info_nce(u, v, 0.1)).mean()

    agree(ConVIRTLoss(weight=weight), expected, (X, Y))


@pytest.mark.parametrize(
    "graph, pairs", [("full", [(0, 1), (0, 2), (1, 2)]), ("core", [(0, 1), (0, 2)])]
)
def test_cmc(graph, pairs):
    Z = randn(6, 4, dtype=torch.float64, seed=2)

    def expected(*views):
        both = ((a, b) for i, j in pairs for a, b in ((i, j), (j, i)))
        return sum(info_nce(views[a], views[b], 0.5).mean() for a, b in both)

    agree(lambda *views: CMCLoss(0.5, graph)(views), expected, (X, Y, Z))


def test_half_precision():
    x, y = X.bfloat16(), Y.bfloat16()
    loss = ContrastiveLoss(temperature=0.2)(x, y)
    torch.testing.assert_close(
        loss.double(), info_nce(x.double(), y.double(), 0.2).mean(), rtol=0.02, atol=0
    )


@pytest.mark.parametrize(
    "match, make",
    [
        ("kind must be", lambda: ContrastiveLoss("clip")),
        ("temperature must be", lambda: ContrastiveLoss(temperature=0.0)),
        ("base_temperature must be", lambda: SupConLoss(base_temperature=-1.0)),
        ("features must be", lambda: SupConLoss()(X)),
        ("labels must be", lambda: SupConLoss()(X[:, None], torch.arange(5))),
        ("queries and keys", lambda: PatchNCELoss()(X[None], Y[None, :5])),
        ("weight must be", lambda: ConVIRTLoss(weight=2.0)),
        ("images and texts", lambda: ConVIRTLoss()(X, Y[:5])),
        ("graph must be", lambda: CMCLoss(graph="star")),
        ("views must be", lambda: CMCLoss()([X])),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
