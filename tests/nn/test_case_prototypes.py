"""The case-based prototype network against its formulas in float64."""

import pytest
import torch
from torch import nn

from weft.nn import CaseBasedLoss, PrototypeLayer
from weft.ops.cases import randn


def pieces(dtype=torch.float64):
    z, p = randn(6, 3, dtype=dtype), randn(4, 3, dtype=dtype, seed=1)
    x, decoded = randn(6, 2, 5, dtype=dtype, seed=2), randn(6, 2, 5, dtype=dtype, seed=3)
    logits, labels = randn(6, 5, dtype=dtype, seed=4), torch.tensor([0, 3, 2, 4, 4, 1])
    tensors = [t.requires_grad_() for t in (logits, decoded, z, p)]
    return tensors, x, labels


def by_loops(logits, labels, decoded, x, z, p):
    """The four terms of the paper, one pair at a time."""
    N, K = len(z), len(p)
    d = [[(z[i] - p[j]).square().sum() for j in range(K)] for i in range(N)]
    cross_entropy = sum(-logits[i].softmax(0)[labels[i]].log() for i in range(N)) / N
    reconstruction = sum((decoded[i] - x[i]).square().sum() for i in range(N)) / N
    r1 = sum(min(d[i][j] for i in range(N)) for j in range(K)) / K
    r2 = sum(min(d[i][j] for j in range(K)) for i in range(N)) / N
    return cross_entropy, reconstruction, r1, r2


def test_loss_is_the_papers():
    (logits, decoded, z, p), x, labels = pieces()
    expected = by_loops(logits, labels, decoded, x, z, p)
    terms = CaseBasedLoss(20, 0.5, 2, 3)(logits, labels, decoded, x, z, p)
    for term, wanted in zip(terms[1:], expected, strict=True):
        torch.testing.assert_close(term, wanted)
    total = sum(w * t for w, t in zip((20, 0.5, 2, 3), expected, strict=True))
    torch.testing.assert_close(terms.loss, total)
    inputs = (logits, decoded, z, p)
    ours, wanted = torch.autograd.grad(terms.loss, inputs), torch.autograd.grad(total, inputs)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_layer_gives_squared_distances():
    layer = PrototypeLayer(3, 4, dtype=torch.float64)
    assert layer.prototypes.min() >= 0 and layer.prototypes.max() < 1
    z = randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    expected = (z[..., None, :] - layer.prototypes).square().sum(-1)
    torch.testing.assert_close(layer(z), expected)
    upstream = randn(2, 5, 4, dtype=torch.float64, seed=1)
    inputs = (z, layer.prototypes)
    ours = torch.autograd.grad((layer(z) * upstream).sum(), inputs)
    wanted = torch.autograd.grad((expected * upstream).sum(), inputs)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert layer(z[0, 0]).shape == (4,) and layer(z[:0]).shape == (0, 5, 4)


def test_a_network_learns_and_its_prototypes_are_near_samples():
    torch.manual_seed(0)
    labels = torch.arange(90) % 3
    x = 2 * randn(3, 6)[labels] + 0.3 * randn(90, 6, seed=1)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 6)
    layer, last = PrototypeLayer(4, 5), nn.Linear(5, 3, bias=False)
    network = nn.ModuleList([encoder, decoder, layer, last])
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    criterion = CaseBasedLoss()
    for _ in range(80):
        optimizer.zero_grad()
        z = encoder(x)
        terms = criterion(last(layer(z)), labels, decoder(z), x, z, layer.prototypes)
        terms.loss.backward()
        optimizer.step()
    assert (last(layer(encoder(x))).argmax(1) == labels).all()
    spread = z.detach().var(0).sum()
    assert terms.prototypes_to_samples < 0.1 * spread


def test_half_precision():
    (logits, decoded, z, p), x, labels = pieces(torch.float32)
    halves = [t.detach().bfloat16() for t in (logits, decoded, x, z)]
    terms = CaseBasedLoss()(halves[0], labels, *halves[1:], p)
    wide = [t.float() for t in halves]
    exact = CaseBasedLoss()(wide[0], labels, *wide[1:], p)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss, exact.loss)
    assert PrototypeLayer(3, 4)(halves[3]).dtype == torch.float32


def test_refuses():
    (logits, decoded, z, p), x, labels = pieces()
    criterion = CaseBasedLoss()
    bad = [
        ("logits must be", (logits[:, :0], labels, decoded, x, z, p)),
        ("labels must be", (logits, labels + 1, decoded, x, z, p)),
        ("features must be", (logits, labels, decoded, x, z[:2], p)),
        ("prototypes must be", (logits, labels, decoded, x, z, p[:, :2])),
        ("decoded and inputs", (logits, labels, decoded[:, :1], x, z, p)),
    ]
    for match, arguments in bad:
        with pytest.raises(ValueError, match=match):
            criterion(*arguments)
    with pytest.raises(ValueError, match="reconstruction must be >= 0"):
        CaseBasedLoss(reconstruction=-1.0)
    with pytest.raises(ValueError, match="num_prototypes"):
        PrototypeLayer(3, 0)
    with pytest.raises(ValueError, match="z must be"):
        PrototypeLayer(3, 4)(torch.ones(2, 2))
