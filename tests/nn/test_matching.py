"""Mutual nearest neighbours by loops, and dual softmax by its whole matrix, in float64."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import DualSoftmaxMatching, mutual_nearest
from weft.ops.cases import randn


def pairs_of(matches):
    return [*zip(*(t.tolist() for t in matches[:3]), strict=True)]


def by_loops(x, y, distance, threshold, ratio):
    """One problem: [(i, j)] for distances."""
    d = [[float(distance(p, q)) for q in y] for p in x]
    found = []
    for i, row in enumerate(d):
        j = min(range(len(row)), key=row.__getitem__)
        column = [r[j] for r in d]
        order = sorted(row)
        if min(range(len(d)), key=column.__getitem__) != i or row[j] >= threshold:
            continue
        if len(order) == 1 or order[0] < ratio * order[1]:
            found.append((i, j))
    return found


@pytest.mark.parametrize("threshold, ratio", [(9.0, 9.0), (1.2, 9.0), (9.0, 0.8)])
def test_mutual_nearest_by_loops(threshold, ratio):
    x, y = randn(3, 9, 3, dtype=torch.float64), randn(3, 7, 3, dtype=torch.float64, seed=1)
    x_lengths, y_lengths = torch.tensor([9, 5, 4]), torch.tensor([7, 6, 1])
    expected = []
    for b, (n, m) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        own = by_loops(x[b, :n], y[b, :m], lambda p, q: (p - q).norm(), threshold, ratio)
        expected += [(b, i, j) for i, j in own]
        x[b, n:] = torch.nan
        y[b, m:] = torch.nan
    lengths = {"x_lengths": x_lengths, "y_lengths": y_lengths}
    options = {"metric": "euclidean", "threshold": threshold, "ratio": ratio}
    found = mutual_nearest(x, y, **options, **lengths)
    assert pairs_of(found) == expected and 0 < len(expected) < 16
    distances = (x[found.batch, found.x_index] - y[found.batch, found.y_index]).norm(dim=1)
    torch.testing.assert_close(found.score, distances)


def test_mutual_nearest_of_a_permutation():
    """Each point finds its copy; scores have gradients; similarities have a lower threshold."""
    x = randn(20, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    y = (x[order] * 2).requires_grad_()
    found = mutual_nearest(x, y, threshold=0.999)
    assert torch.equal(order[found.y_index], found.x_index) and len(found.score) == 20
    assert torch.autograd.grad(found.score.sum(), y)[0].shape == y.shape
    assert not len(mutual_nearest(x, y, threshold=1.5).score)
    assert not len(mutual_nearest(x, y[:0]).score) and not len(mutual_nearest(x[:0], y).score)
    assert not len(mutual_nearest(x[None][:0], y[None][:0]).score)


def maps(B=2, D=6, H=5, W=6):
    """y is x moved by one column, with noise: most places have a partner."""
    x = 1.5 * randn(B, D, H, W, dtype=torch.float64)
    y = x.roll(1, 3)[..., : H - 1, :]
    return x, y + 0.3 * randn(*y.shape, dtype=torch.float64, seed=1)


def published(p, inner_x, inner_y, threshold):
    """The authors' steps on the whole matrix, (B, HW, H'W')."""
    mask = p > threshold
    mask &= inner_x[:, :, None] & inner_y[:, None]
    mask &= (p == p.amax(2, keepdim=True)) & (p == p.amax(1, keepdim=True))
    return mask.nonzero().tolist()


def inner(B, size, used, border):
    place = torch.zeros(B, *size, dtype=torch.bool)
    for b, (h, w) in enumerate(used):
        place[b, border : h - border, border : w - border] = True
    return place.flatten(1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("border", [0, 1])
def test_dual_softmax_is_the_published_one(padded, border):
    x, y = maps()
    B, D = x.shape[:2]
    used_x = [(5, 6), (3, 5)] if padded else [(5, 6)] * 2
    used_y = [(4, 6), (3, 4)] if padded else [(4, 6)] * 2
    masks = [inner(B, t.shape[2:], used, 0) for t, used in ((x, used_x), (y, used_y))]
    layer = DualSoftmaxMatching(threshold=0.05, border=border)
    arguments = [m.view(B, *t.shape[2:]) for m, t in zip(masks, (x, y), strict=True)]
    arguments = (x, y, *arguments) if padded else (x, y)
    scores = torch.einsum("bdi,bdj->bij", x.flatten(2), y.flatten(2)) / D / 0.1
    scores = scores.masked_fill(~(masks[0][:, :, None] & masks[1][:, None]), -1e9)
    p = F.softmax(scores, 1) * F.softmax(scores, 2)
    torch.testing.assert_close(
        layer.confidences(*arguments), p * masks[0][:, :, None] * masks[1][:, None]
    )
    edges = [inner(B, t.shape[2:], u, border) for t, u in ((x, used_x), (y, used_y))]
    expected = published(p, *edges, 0.05)
    found = layer(*arguments)
    assert [list(pair) for pair in pairs_of(found)] == expected and len(expected) > 2
    torch.testing.assert_close(found.score, p[found[:3]])


def test_nms_keeps_the_surest_of_a_window():
    x, y = maps()
    every = DualSoftmaxMatching(threshold=0.0, border=0)
    confidence = every.confidences(x, y).amax(2).view(2, 5, 6)
    kept = {(b, i) for b, i, _ in pairs_of(DualSoftmaxMatching(0.1, 0.0, 0, nms=3)(x, y))}
    expected = set()
    for b, i, _ in pairs_of(every(x, y)):
        r, c = divmod(i, 6)
        window = confidence[b, max(0, r - 1) : r + 2, max(0, c - 1) : c + 2]
        if confidence[b, r, c] == window.max():
            expected.add((b, i))
    assert kept == expected and 0 < len(kept) < len(every(x, y).score)


def test_confidences_have_gradients():
    x, y = (t.requires_grad_() for t in maps(B=1, D=3, H=3, W=2))
    layer = DualSoftmaxMatching(1.0, 0.0, 0)
    found = layer(x, y)
    p = layer.confidences(x, y)[found[:3]]
    for one, other in zip(
        torch.autograd.grad(found.score.sum(), (x, y)),
        torch.autograd.grad(p.sum(), (x, y)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_bad_arguments():
    x, y = maps()
    with pytest.raises(ValueError, match="ratio is of distances"):
        mutual_nearest(torch.ones(2, 3), torch.ones(2, 3), ratio=0.8)
    with pytest.raises(ValueError, match=r"x_lengths must be in \[0, 2\]"):
        mutual_nearest(torch.ones(1, 2, 3), torch.ones(1, 2, 3), x_lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="nms must be an odd integer"):
        DualSoftmaxMatching(nms=2)
    with pytest.raises(ValueError, match="border must be an integer"):
        DualSoftmaxMatching(border=-1)
    with pytest.raises(TypeError, match="x_mask must be bool"):
        DualSoftmaxMatching()(x, y, torch.ones(2, 5, 6))
    with pytest.raises(ValueError, match="x and y must be"):
        DualSoftmaxMatching()(x, y[:, :3])
