"""PatchCT's alignment loss, one pair of patch and label at a time in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from weft.nn import PatchCTLoss
from weft.ops.cases import randn

B, N, M, D = 3, 5, 4, 6
TARGETS = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])


def by_loops(patches, labels, temperature, rho):
    total = 0
    for b in range(B):
        own = [j for j in range(M) if TARGETS[b, j]]
        cosine = {
            (i, j): F.cosine_similarity(patches[b, i], labels[j], 0) for i in range(N) for j in own
        }
        weight = {pair: (c / temperature).exp() for pair, c in cosine.items()}
        for i in range(N):
            for j in own:
                to_label = weight[i, j] / sum(weight[i, k] for k in own)
                to_patch = weight[i, j] / sum(weight[k, j] for k in range(N))
                share = rho * to_label / N + (1 - rho) * to_patch / len(own)
                total = total + share * (1 - cosine[i, j])
    return total / 2  # images with a label


@pytest.mark.parametrize("learnable", [False, True])
def test_is_the_formula(learnable):
    patches = randn(B, N, D, dtype=torch.float64).requires_grad_()
    labels = randn(M, D, dtype=torch.float64, seed=1).requires_grad_()
    loss = PatchCTLoss(0.2, 0.3, learnable=learnable, dtype=torch.float64)
    found = loss(patches, labels, TARGETS)
    leaves = [patches, labels, *loss.parameters()]
    temperature = loss.log_temperature.exp() if learnable else 0.2
    expected = by_loops(patches, labels, temperature, 0.3)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert len(leaves) == 2 + learnable
    if learnable:
        assert loss.log_temperature.item() == pytest.approx(math.log(0.2))


def test_padding_and_images_without_labels():
    patches, labels = randn(B, N, D), randn(M, D, seed=1)
    loss, weights = PatchCTLoss(), torch.ones(B, N)
    weights[:, 3:] = 0
    padded = patches.clone()
    padded[:, 3:] = torch.nan
    found = loss(padded, labels, TARGETS.bool(), weights)
    torch.testing.assert_close(found, loss(patches[:, :3], labels, TARGETS.double()))
    assert loss(patches, labels, torch.zeros(B, M)) == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="temperature must be > 0"):
        PatchCTLoss(0.0)
    with pytest.raises(ValueError, match=r"rho must be in \[0, 1\]"):
        PatchCTLoss(rho=2.0)
    with pytest.raises(ValueError, match=r"labels must be \(\.\.\., 6\)"):
        PatchCTLoss()(torch.ones(B, N, D), torch.ones(M, D + 1), TARGETS)
