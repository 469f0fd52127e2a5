"""Neighbourhood attention and ColorMNet's local attention, one place and neighbour at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from weft.nn import LocalFrameAttention, NeighborhoodAttention
from weft.ops.cases import randn


def assert_same(ours, expected, inputs):
    torch.testing.assert_close(ours, expected)
    upstream = randn(*ours.shape, dtype=torch.float64, seed=3)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def neighbours(p, size, kernel, dilation):
    """The places of one axis that p sees: those of its residue, the nearest kernel of them to a
    window around p that is moved into the axis."""
    own = [q for q in range(size) if q % dilation == p % dilation]
    start = own.index(p) - kernel // 2
    start = min(max(start, 0), len(own) - kernel)
    return own[start : start + kernel]


def neighborhood(layer, x):
    B, H, W, C = x.shape
    heads, D = layer.num_heads, C // layer.num_heads
    (kh, kw), (dh, dw) = layer.kernel, layer.dilation
    outputs = []
    for image in x:
        q, k, v = layer.qkv(image).view(H, W, 3, heads, D).unbind(2)
        for y in range(H):
            for z in range(W):
                parts = []
                for head in range(heads):
                    scores, values = [], []
                    for r in neighbours(y, H, kh, dh):
                        for c in neighbours(z, W, kw, dw):
                            score = q[y, z, head] @ k[r, c, head] / math.sqrt(D)
                            if layer.rpb is not None:
                                row, column = (r - y) // dh + kh - 1, (c - z) // dw + kw - 1
                                score = score + layer.rpb[head, row, column]
                            scores.append(score)
                            values.append(v[r, c, head])
                    weights = torch.stack(scores).softmax(0)
                    parts.append((weights[:, None] * torch.stack(values)).sum(0))
                outputs.append(layer.proj(torch.cat(parts)))
    return torch.stack(outputs).view(x.shape)


@pytest.mark.parametrize(
    "size, kernel, dilation, relative_bias",
    [
        ((5, 6), 3, 1, True),
        ((5, 6), 3, 1, False),
        ((7, 6), (3, 5), 1, True),
        ((7, 8), 3, 2, True),
        ((6, 7), (1, 3), (4, 2), True),
        ((5, 5), 5, 1, True),
    ],
)
def test_neighborhood(size, kernel, dilation, relative_bias):
    torch.manual_seed(0)
    options = {"relative_bias": relative_bias, "dtype": torch.float64}
    layer = NeighborhoodAttention(4, 2, kernel, dilation, **options)
    if relative_bias:
        torch.nn.init.normal_(layer.rpb)
    x = randn(2, *size, 4, dtype=torch.float64).requires_grad_()
    assert_same(layer(x), neighborhood(layer, x), [x, *layer.parameters()])


def local_frames(layer, query, key, value):
    """The authors' unfolding of a zero-padded frame, its padding masked, made one over T frames."""
    B, _, H, W = query.shape
    heads, window = layer.num_heads, 2 * layer.radius + 1
    reach = layer.radius * layer.dilation

    def unfolded(t):  # (B, heads, D, T, window², N)
        frames = t.transpose(1, 2).flatten(0, 1)
        parts = F.unfold(F.pad(frames, 4 * (reach,)), window, layer.dilation)
        return (
            parts.view(B, t.shape[2], heads, -1, window**2, H * W).transpose(1, 2).transpose(2, 3)
        )

    q = query.view(B, heads, -1, H * W)
    bias = F.conv2d(query, layer.relative_emb_k.weight, layer.relative_emb_k.bias, groups=heads)
    scores = torch.einsum("bhdn,bhdton->bhton", q / math.sqrt(q.shape[2]), unfolded(key))
    scores = scores + bias.view(B, heads, 1, window**2, H * W)
    beyond = unfolded(torch.ones(B, heads, key.shape[2], H, W, dtype=q.dtype))[:, :, 0] == 0
    scores = scores.masked_fill(beyond, float("-inf"))
    weights = scores.flatten(2, 3).softmax(2).view(scores.shape)
    out = torch.einsum("bhton,bhdton->bhdn", weights, unfolded(value)).reshape(B, -1, H, W)
    out = F.conv2d(out, layer.dw_conv.conv.weight, padding=2, groups=out.shape[1])
    return layer.projection(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "size, heads, radius, dilation, frames",
    [((4, 6), 1, 1, 1, 1), ((5, 4), 2, 2, 1, 1), ((5, 6), 2, 1, 2, 2), ((3, 4), 1, 5, 1, 3)],
)
def test_local_frames(size, heads, radius, dilation, frames):
    torch.manual_seed(0)
    layer = LocalFrameAttention(4, 6, heads, radius, dilation, dtype=torch.float64).eval()
    query = randn(2, 4, *size, dtype=torch.float64).requires_grad_()
    key = randn(2, 4, frames, *size, dtype=torch.float64, seed=1).requires_grad_()
    value = randn(2, 6, frames, *size, dtype=torch.float64, seed=2).requires_grad_()
    expected = local_frames(layer, query, key, value)
    inputs = [query, key, value, *layer.parameters()]
    assert_same(layer(query, key, value), expected, inputs)
    if frames == 1:
        torch.testing.assert_close(layer(query, key[:, :, 0], value[:, :, 0]), expected)


def test_refuses():
    layer = LocalFrameAttention(4, 6, 2)
    query, key, value = randn(2, 4, 3, 5), randn(2, 4, 3, 5), randn(2, 6, 3, 5)
    for match, make in [
        ("dim must be", lambda: NeighborhoodAttention(8, 3)),
        ("kernel must be odd", lambda: NeighborhoodAttention(8, 2, 4)),
        ("dilation must be", lambda: NeighborhoodAttention(8, 2, 3, 0)),
        ("x must be of at least", lambda: NeighborhoodAttention(8, 2, 3, 2)(randn(2, 5, 7, 8))),
        ("x must be", lambda: NeighborhoodAttention(8, 2, 3)(randn(2, 7, 8))),
        ("multiples of num_heads", lambda: LocalFrameAttention(4, 5, 2)),
        ("radius must be", lambda: LocalFrameAttention(4, 6, 2, 0)),
        ("dropout must be", lambda: LocalFrameAttention(4, 6, dropout=1.0)),
        ("query must be", lambda: layer(query[:, :3], key, value)),
        ("key must be", lambda: layer(query, key[:, :, :2], value)),
        ("value must be", lambda: layer(query, key, value[:, :4])),
        ("value must be of the key's", lambda: layer(query, key[:, :, None], value)),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
