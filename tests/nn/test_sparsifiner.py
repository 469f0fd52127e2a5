"""Sparsifiner's mask and attention against its formulas, one row at a time."""

import math

import pytest
import torch

from weft.nn import ConnectivityPredictor, SparsifinerAttention
from weft.ops.cases import randn

B, N, C, H, RANK = 2, 11, 12, 3, 4


def make(**options):
    torch.manual_seed(0)
    layer = SparsifinerAttention(C, N, H, rank=RANK, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def heads(layer, x):
    return [t.unflatten(-1, (H, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1)]


def coefficients(predictor, q, k):
    """(RANK,) of one patch of one head."""
    mixed = sum(torch.outer(predictor.proj_n[j], predictor.proj_c_k(k[j])) for j in range(N))
    return torch.softmax(mixed @ predictor.proj_c_q(q) / H**0.5, 0)


def published_row(layer, q, k, keep, threshold, num_basis, cuts):
    predictor = layer.mask_predictor
    c = coefficients(predictor, q, k)
    if num_basis is not None:
        order = c.argsort(descending=True)
        c = torch.stack([v if i in order[:num_basis] else 0 * v for i, v in enumerate(c)])
    else:
        c = torch.where(c <= cuts[0], 0, c)
    basis = predictor.proj_back_n.abs()
    scores = torch.where(basis <= cuts[1], 0, basis) @ c
    if keep is None:
        return scores > threshold
    mask = torch.zeros(N, dtype=torch.bool)
    mask[scores.argsort(descending=True)[: math.ceil(keep * N)]] = True
    return mask


@pytest.mark.parametrize(
    "keep, threshold, num_basis, cuts",
    [
        (0.3, 0.0, None, (0.0, 0.0)),
        (0.25, 0.0, 2, (0.0, 0.0)),
        (None, 0.4, None, (0.2, 0.3)),
        (None, 0.7, 1, (0.0, 0.5)),
    ],
)
def test_is_the_published_one(keep, threshold, num_basis, cuts):
    options = {"coefficient_threshold": cuts[0], "basis_threshold": cuts[1]}
    layer = make(keep=keep, threshold=threshold, num_basis=num_basis, **options)
    x = randn(B, N, C, dtype=torch.float64).requires_grad_()
    q, k, v = heads(layer, x)
    mask = torch.ones(B, H, N, N, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for i in range(1, N):
                mask[b, h, i] = published_row(
                    layer, q[b, h, i], k[b, h], keep, threshold, num_basis, cuts
                )
    assert torch.equal(layer.mask_predictor(q, k), mask)
    assert 0.05 < mask[:, :, 1:].double().mean() < 0.95
    out = layer(x)
    rows = []
    for b in range(B):
        for i in range(N):
            parts = []
            for h in range(H):
                seen = mask[b, h, i]
                p = torch.softmax(k[b, h, seen] @ q[b, h, i] / (C // H) ** 0.5, 0)
                parts.append(p @ v[b, h, seen])
            rows.append(layer.proj(torch.cat(parts)))
    truth = torch.stack(rows).view(B, N, C)
    torch.testing.assert_close(out, truth)
    inputs = [x, *layer.qkv.parameters(), *layer.proj.parameters()]
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_no_key_above_the_threshold():
    layer = make(keep=None, threshold=1e3)
    x = randn(B, N, C, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:, 1:], layer.proj.bias.expand(B, N - 1, C))


def test_approximation_trains_the_predictor():
    layer = make()
    x = randn(B, N, C, dtype=torch.float64)
    q, k, _ = heads(layer, x)
    approximation = layer.approximate(x)
    predictor = layer.mask_predictor
    for b, h, i in [(0, 0, 1), (1, 2, 10), (1, 1, 4)]:
        truth = predictor.proj_back_n @ coefficients(predictor, q[b, h, i], k[b, h])
        torch.testing.assert_close(approximation[b, h, i - 1], truth)
    target = (q @ k.mT / (C // H) ** 0.5).softmax(-1)[:, :, 1:].detach()

    def loss():
        return torch.nn.functional.mse_loss(layer.approximate(x), target, reduction="sum")

    before = loss()
    before.backward()
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            assert parameter.grad.abs().max() > 0, name
            parameter -= 1e-3 * parameter.grad
    assert loss() < before


@pytest.mark.parametrize(
    "match, make",
    [
        ("multiple", lambda: SparsifinerAttention(10, N, H)),
        ("keep", lambda: SparsifinerAttention(C, N, H, keep=0.0)),
        ("num_basis", lambda: SparsifinerAttention(C, N, H, rank=2, num_basis=3)),
        ("basis_threshold", lambda: SparsifinerAttention(C, N, H, basis_threshold=-1.0)),
        ("rank", lambda: ConnectivityPredictor(4, N, rank=0)),
        ("x must be", lambda: SparsifinerAttention(C, N, H)(torch.ones(B, N + 1, C))),
        ("query must", lambda: ConnectivityPredictor(4, N, H)(*[torch.ones(B, H, N, 3)] * 2)),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
