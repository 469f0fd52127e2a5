"""Balanced assignments and their losses against the published loops."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import (
    SinkhornAssignment,
    SwappedPredictionLoss,
    assignment_cross_entropy,
    koleo_loss,
)
from weft.ops.cases import randn

FLOAT64 = {"dtype": torch.float64}


def sinkhorn_of_teacher(scores, temperature, iterations=3):
    """DINOv2: Q of shape (prototypes, samples), rows to 1/K, columns to 1/B."""
    Q = (scores.double() / temperature).exp().T
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / B
    return (Q * B).T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_assignments_are_the_published_ones(dtype):
    scores = randn(21, 8, dtype=dtype).requires_grad_()
    found = SinkhornAssignment(0.3)(scores)
    assert not found.requires_grad and found.dtype == torch.promote_types(dtype, torch.float32)
    expected = sinkhorn_of_teacher(scores.detach(), 0.3).to(found.dtype)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(21, dtype=found.dtype))


def test_swapped_prediction_is_the_published_loop():
    crops = [randn(9, 6, seed=seed, **FLOAT64).requires_grad_() for seed in range(4)]
    queue = [randn(12, 6, seed=seed, **FLOAT64) for seed in (7, 8)]
    for stored in (None, queue):
        loss = 0
        for place, i in enumerate((0, 1)):
            scores = crops[i].detach()
            if stored is not None:
                scores = torch.cat([stored[place], scores])
            q = sinkhorn_of_teacher(scores, 0.05)[-9:]
            part = 0
            for v in range(4):
                if v != i:
                    part -= (q * F.log_softmax(crops[v] / 0.1, 1)).sum(1).mean()
            loss += part / 3
        expected = torch.autograd.grad(loss / 2, crops)
        found = SwappedPredictionLoss()(crops, stored)
        torch.testing.assert_close(found, loss / 2)
        for one, two in zip(torch.autograd.grad(found, crops), expected, strict=True):
            torch.testing.assert_close(one, two)


def test_cross_entropy_of_masked_tokens_is_that_of_ibot():
    masks = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    student = randn(4, 5, **FLOAT64).requires_grad_()
    teacher = randn(4, 5, seed=1, **FLOAT64).softmax(1)
    expected, token = 0, 0
    for image in masks:
        of_image = 0
        for _ in range(int(image.sum())):
            of_image -= (teacher[token] * F.log_softmax(student[token] / 0.1, 0)).sum()
            token += 1
        expected += of_image / max(int(image.sum()), 1)
    weights = (1.0 / masks.sum(1, keepdim=True).clamp(min=1)).expand_as(masks)[masks].double()
    found = assignment_cross_entropy(student, teacher, weights=weights, reduction="sum")
    torch.testing.assert_close(found, expected)
    plain = assignment_cross_entropy(student, teacher, reduction="none")
    torch.testing.assert_close((plain * weights).sum(), expected)
    mean = assignment_cross_entropy(student, teacher, weights=weights)
    torch.testing.assert_close(mean, expected / 2)
    assert assignment_cross_entropy(student[:0], teacher[:0]) == 0


def test_koleo_is_a_loop_over_nearest_neighbours():
    x = randn(13, 6, **FLOAT64).requires_grad_()
    unit = F.normalize(x, dim=1)
    loss = 0
    for i in range(13):
        others = [j for j in range(13) if j != i]
        j = max(others, key=lambda j: float(unit[i] @ unit[j]))
        loss -= ((unit[i] - unit[j]).norm() + 1e-8).log() / 13
    found = koleo_loss(x)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(loss, x))


def test_koleo_of_repeated_features_is_finite():
    x = randn(4, 3).repeat(2, 1).requires_grad_()
    loss = koleo_loss(x)
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_refuses():
    scores = torch.ones(3, 4)
    for match, call in {
        "epsilon must be > 0": lambda: SinkhornAssignment(0.0),
        "iterations must be an integer": lambda: SinkhornAssignment(iterations=0),
        "at least 2 crops": lambda: SwappedPredictionLoss()([scores]),
        "queue must have scores for 2": lambda: SwappedPredictionLoss()([scores] * 2, [scores]),
        "assignments must be": lambda: assignment_cross_entropy(scores, scores[:2]),
        "weights must be": lambda: assignment_cross_entropy(scores, scores, weights=scores),
        "reduction must be": lambda: assignment_cross_entropy(scores, scores, reduction="max"),
        "temperature must be > 0": lambda: assignment_cross_entropy(scores, scores, temperature=0),
        "N >= 2": lambda: koleo_loss(scores[:1]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
