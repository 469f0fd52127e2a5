"""Orthogonal layers: what they keep, after training too, and their losses by hand."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import (
    BasisTransformation,
    OrthogonalCompatibleLayer,
    backward_compatible_loss,
    orthogonal_linear,
)
from weft.ops.cases import randn

MAPS = ["matrix_exp", "cayley", "householder"]


@pytest.mark.parametrize("parametrization", MAPS)
def test_rotation_stays_orthogonal_and_can_learn(parametrization):
    torch.manual_seed(0)
    target = torch.linalg.qr(randn(6, 6, dtype=torch.float64)).Q
    if torch.linalg.det(target) < 0:
        target[0] = -target[0]
    layer = orthogonal_linear(6, parametrization=parametrization, dtype=torch.float64)
    while torch.linalg.det(layer.weight) < 0:  # a free matrix cannot leave its component
        layer = orthogonal_linear(6, parametrization=parametrization, dtype=torch.float64)
    x = randn(64, 6, dtype=torch.float64, seed=1)
    adam = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        adam.zero_grad()
        loss = (layer(x) - x @ target.mT).square().mean()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(layer.weight @ layer.weight.mT, identity, rtol=0, atol=1e-12)
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("parametrization", MAPS)
def test_compatible_layer(parametrization):
    layer = OrthogonalCompatibleLayer(4, 3, parametrization=parametrization, dtype=torch.float64)
    x = randn(2, 5, 7, dtype=torch.float64)
    compatible, output = layer(x)
    assert torch.equal(compatible, x[..., :4])
    torch.testing.assert_close(output @ output.mT, x @ x.mT)
    torch.testing.assert_close(output @ layer.rotation.weight, x)  # nothing is lost


@pytest.mark.parametrize("D, d, extra", [(6, 6, 2), (6, 4, 1), (4, 6, 3), (5, 7, 2)])
def test_basis_transformation_is_an_isometry(D, d, extra):
    layer = BasisTransformation(D, d, extra, scale=3.0, dtype=torch.float64)
    f, old = randn(5, D, dtype=torch.float64), randn(5, extra + 2, dtype=torch.float64, seed=1)
    compatible, output = layer(f, old)
    assert compatible.shape == (5, d) and output.shape == (5, D + extra)
    assert torch.equal(output[:, :d], compatible)
    unit_f, unit_e = F.normalize(f, dim=1), F.normalize(old[:, :extra], dim=1)
    torch.testing.assert_close(output @ output.mT, unit_e @ unit_e.mT + 9 * unit_f @ unit_f.mT)


def test_basis_transformation_is_the_published_composition():
    layer = BasisTransformation(6, 5, 2, scale=3.0, dtype=torch.float64)
    f, old = randn(4, 6, dtype=torch.float64), randn(4, 5, dtype=torch.float64, seed=1)
    P, Q = layer.turn_new.weight, layer.turn_old.weight
    z = torch.cat([F.normalize(old[:, :2]), 3 * F.normalize(f) @ P.mT], 1)
    expected = torch.cat([z[:, :5] @ Q.mT, z[:, 5:]], 1)
    torch.testing.assert_close(layer(f, old)[1], expected)


def test_backward_compatible_loss_by_hand():
    x, prototypes = randn(4, 6, dtype=torch.float64), randn(3, 6, dtype=torch.float64, seed=1)
    labels = torch.tensor([0, 2, 1, 2])
    total = 0.0
    for row, y in zip(x, labels, strict=True):
        cosine = F.cosine_similarity(row[None], prototypes)
        total += cosine.exp().sum().log() - cosine[y] + 0.7 * (1 - cosine[y])
    loss = backward_compatible_loss(x, prototypes, labels, weight=0.7)
    torch.testing.assert_close(loss, total / 4)


@pytest.mark.parametrize(
    "match, make",
    [
        ("parametrization", lambda: orthogonal_linear(3, parametrization="qr")),
        ("features", lambda: orthogonal_linear(0)),
        ("extra_features", lambda: OrthogonalCompatibleLayer(3, -1)),
        ("x must be", lambda: OrthogonalCompatibleLayer(3, 1)(torch.ones(2, 3))),
        ("old_features", lambda: BasisTransformation(3, 6, 2)),
        ("scale", lambda: BasisTransformation(3, 3, 2, scale=0)),
        ("old_branch", lambda: BasisTransformation(3, 3, 2)(torch.ones(2, 3), torch.ones(2, 1))),
        ("features", lambda: BasisTransformation(3, 3, 2)(torch.ones(2, 4), torch.ones(2, 2))),
        ("labels", lambda: backward_compatible_loss(*[torch.ones(2, 3)] * 2, torch.tensor([0, 2]))),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
