"""BOAT's clustering and its attention against the public code's steps, token by token."""

import math

import pytest
import torch
from torch.nn import functional as F

from weft.nn import FeatureSpaceAttention, balanced_clusters
from weft.ops.cases import randn


def bisected(tokens, levels, steps):
    """Indices in the order of the clusters, by recursion on one ``(N, D)``."""

    def direction(v):
        return v / v.norm()

    def split(indices, levels):
        if not levels:
            return indices
        m = len(indices) // 2
        halves = indices[:m], indices[m:]
        centroids = [direction(sum(tokens[i] for i in half) / m) for half in halves]
        for _ in range(steps):
            sums = [0, 0]
            for i in indices:
                cosines = torch.stack([direction(tokens[i]) @ c for c in centroids])
                for k, share in enumerate((100 * cosines).softmax(0)):
                    sums[k] = sums[k] + share * tokens[i]
            centroids = [direction(s) for s in sums]

        def ratio(i):
            first, second = (float(direction(tokens[i]) @ c) for c in centroids)
            return (1 + first) / (1 + second)

        ordered = sorted(indices, key=ratio)
        return split(ordered[:m], levels - 1) + split(ordered[m:], levels - 1)

    return split(list(range(len(tokens))), levels)


@pytest.mark.parametrize("N, levels, steps", [(8, 1, 2), (24, 3, 2), (20, 2, 0), (6, 0, 2)])
def test_clusters_are_the_published_ones(N, levels, steps):
    x = randn(2, 3, N, 5, dtype=torch.float64)
    order = balanced_clusters(x, levels, steps)
    expected = [bisected(tokens, levels, steps) for tokens in x.flatten(0, 1)]
    assert order.flatten(0, 1).tolist() == expected


def test_clusters_hold_what_looks_alike():
    """Two groups of directions, shuffled, come apart."""
    groups = F.one_hot(torch.arange(2), 6).double().repeat_interleave(10, 0)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    x = (groups + 0.1 * randn(20, 6, dtype=torch.float64))[shuffled]
    labels = (shuffled[balanced_clusters(x, 1)] // 10).view(2, 10)
    assert (labels == labels[:, :1]).all() and labels[0, 0] != labels[1, 0]


def feature_space(layer, x, levels):
    B, H, W, C = x.shape
    N, D, m = H * W, C // layer.num_heads, H * W // 2**levels
    outputs = []
    for image in x:
        parts = layer.qkv(image.view(N, C)).view(N, 3, layer.num_heads, D)
        local = F.conv2d(
            parts[:, 2].reshape(N, C).T.reshape(1, C, H, W),
            layer.get_v.weight,
            layer.get_v.bias,
            padding=1,
            groups=C,
        )
        rows = [[None] * layer.num_heads for _ in range(N)]
        for head in range(layer.num_heads):
            q, k, v = (parts[:, n, head] for n in range(3))
            order = bisected(q.detach(), levels, 2)
            for n, i in enumerate(order):
                first = n // m * m
                seen = order[first : first + m]
                if levels and (n // m) % 2 == 0:
                    seen = seen + order[first + m : first + m + layer.overlap]
                elif levels:
                    seen = order[first - layer.overlap : first] + seen
                weights = torch.stack([q[i] @ k[j] / math.sqrt(D) for j in seen]).softmax(0)
                rows[i][head] = sum(p * v[j] for p, j in zip(weights, seen, strict=True))
        heads = torch.stack([torch.cat(row) for row in rows])
        outputs.append(layer.proj(heads + local[0].flatten(1).T))
    return torch.stack(outputs).view(x.shape)


@pytest.mark.parametrize(
    "size, cluster_size, overlap, levels",
    [((4, 4), 4, 2, 2), ((4, 4), 4, 0, 2), ((4, 6), 5, 5, 2), ((3, 3), 9, 4, 0), ((2, 2), 9, 4, 0)],
)
def test_is_the_published_one(size, cluster_size, overlap, levels):
    torch.manual_seed(0)
    layer = FeatureSpaceAttention(6, 2, cluster_size, overlap, dtype=torch.float64)
    x = randn(2, *size, 6, dtype=torch.float64).requires_grad_()
    ours, expected = layer(x), feature_space(layer, x, levels)
    torch.testing.assert_close(ours, expected)
    upstream = randn(*x.shape, dtype=torch.float64, seed=3)
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_refuses():
    for match, make in [
        ("dim must be", lambda: FeatureSpaceAttention(8, 3)),
        ("cluster_size must be", lambda: FeatureSpaceAttention(8, 2, 0)),
        ("overlap must be", lambda: FeatureSpaceAttention(8, 2, 4, 5)),
        ("x must be", lambda: FeatureSpaceAttention(8, 2)(randn(2, 4, 8))),
        ("multiple of 4 places", lambda: FeatureSpaceAttention(8, 2, 4, 2)(randn(2, 3, 7, 8))),
        ("levels must be", lambda: balanced_clusters(randn(8, 2), -1)),
        ("steps must be", lambda: balanced_clusters(randn(8, 2), 1, -1)),
        ("multiple of 4", lambda: balanced_clusters(randn(6, 2), 2)),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(TypeError, match="x must be"):
        balanced_clusters(torch.ones(4, 2, dtype=torch.int64), 1)
