"""PixPro's module and loss against the published formulas, one pixel at a time in float64."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import PixelConsistencyLoss, PixelPropagation
from weft.ops.cases import randn

B, D, H, W = 3, 4, 2, 3
BOXES = torch.tensor([[0, 0, 6, 4], [1, 1, 7, 5], [0, 0, 3, 2]], dtype=torch.float64)
OTHERS = torch.tensor([[1, 0, 7, 4], [7, 1, 1, 5], [50, 50, 53, 52]], dtype=torch.float64)


@pytest.mark.parametrize("gamma, layers", [(2.0, 1), (1.0, 0), (0.5, 1), (2.0, 2)])
def test_propagation(gamma, layers):
    torch.manual_seed(0)
    layer = PixelPropagation(D, gamma, layers, dtype=torch.float64)
    x = randn(B, D, H, W, dtype=torch.float64)
    values, expected = layer.value(x), torch.zeros(B, D, H, W).double()
    shift = 1e-6 if gamma < 1 else 0
    for b in range(B):
        for i in range(H * W):
            for j in range(H * W):
                (h, w), (r, c) = divmod(i, W), divmod(j, W)
                cosine = F.cosine_similarity(x[b, :, h, w], x[b, :, r, c], 0)
                value = values[b, :, r, c] / values[b, :, r, c].norm()
                expected[b, :, h, w] += (cosine.clamp(min=0) + shift) ** gamma * value
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x[:1].clone().requires_grad_()) or gamma < 1


def center(box, h, w):
    x0, y0, x1, y1 = box.tolist()
    width, height = (x1 - x0) / W, (y1 - y0) / H
    return x0 + (w + 0.5) * width, y0 + (h + 0.5) * height, (width**2 + height**2) ** 0.5


def published(y, y_other, x, x_other, threshold):
    """regression_loss of the authors' code, halved, both ways, by loops over pixels."""
    total = 0
    for q, k, own, others in ((y, x_other, BOXES, OTHERS), (y_other, x, OTHERS, BOXES)):
        for b in range(B):
            cosines = []
            for i in range(H * W):
                for j in range(H * W):
                    (h, w), (r, c) = divmod(i, W), divmod(j, W)
                    first, second = center(own[b], h, w), center(others[b], r, c)
                    away = ((first[0] - second[0]) ** 2 + (first[1] - second[1]) ** 2) ** 0.5
                    if away / max(first[2], second[2]) < threshold:
                        cosines.append(F.cosine_similarity(q[b, :, h, w], k[b, :, r, c], 0))
            total = total - (sum(cosines) / len(cosines) if cosines else 0)
    return total / B


@pytest.mark.parametrize("threshold", [0.4, 0.7, 1.5])
def test_loss_is_the_published_one(threshold):
    maps = [randn(B, D, H, W, dtype=torch.float64, seed=s).requires_grad_() for s in range(4)]
    loss = PixelConsistencyLoss(threshold)(*maps, BOXES, OTHERS)
    expected = published(maps[0], maps[1], maps[2].detach(), maps[3].detach(), threshold)
    torch.testing.assert_close(loss, expected)
    ours, wanted = (torch.autograd.grad(t, maps[:2]) for t in (loss, expected))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)
    loss = PixelConsistencyLoss(threshold)(*maps, BOXES, OTHERS)
    assert torch.autograd.grad(loss, maps[2:], allow_unused=True) == (None, None)


def test_equal_views_agree():
    x = randn(B, D, H, W)
    boxes = BOXES.float()
    loss = PixelConsistencyLoss(0.1)(x, x, x, x, boxes, boxes)
    torch.testing.assert_close(loss, torch.tensor(-2.0))


def test_refuses():
    x, boxes = randn(B, D, H, W), BOXES.float()
    for match, make in [
        ("gamma must be", lambda: PixelPropagation(D, 0.0)),
        ("layers must be", lambda: PixelPropagation(D, layers=3)),
        ("x must be", lambda: PixelPropagation(D)(x[:, :2])),
        ("threshold must be", lambda: PixelConsistencyLoss(0.0)),
        ("four maps", lambda: PixelConsistencyLoss()(x, x, x, x[:2], boxes, boxes)),
        ("boxes must be", lambda: PixelConsistencyLoss()(x, x, x, x, boxes[:2], boxes)),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
