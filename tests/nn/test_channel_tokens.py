"""ChannelViT's tokens and HAN's attentions against their formulas in float64."""

import pytest
import torch

from weft.nn import ChannelPatchEmbedding, ChannelSpatialAttention, LayerAttention, sample_channels
from weft.ops.cases import randn

B, C, D = 2, 4, 5


def embedding(**options):
    torch.manual_seed(0)
    return ChannelPatchEmbedding((4, 6), 2, C, D, dtype=torch.float64, **options)


def images(count=C):
    return randn(B, count, 4, 6, dtype=torch.float64)


def by_loops(layer, x, channels):
    rows = []
    for b in range(B):
        for n, c in enumerate(channels[b]):
            for p in range(6):
                row, column = 2 * (p // 3), 2 * (p % 3)
                patch = x[b, n, row : row + 2, column : column + 2]
                token = (layer.proj.weight[:, 0] * patch).sum((1, 2)) + layer.proj.bias
                rows.append(token + layer.position[p] + layer.channel[c])
    return torch.stack(rows).view(B, -1, D)


def test_tokens_are_the_published_ones():
    layer = embedding().eval()
    tokens, taken = layer(images())
    torch.testing.assert_close(tokens, by_loops(layer, images(), [range(C)] * B))
    assert taken.tolist() == [list(range(C))] * B
    channels = torch.tensor([[3, 1], [0, 2]])
    tokens, taken = layer(images(2), channels)
    assert torch.equal(taken, channels)
    torch.testing.assert_close(tokens, by_loops(layer, images(2), channels.tolist()))


def test_channels_are_sampled_hierarchically():
    """Every number of channels is as likely, and every channel of a number."""
    torch.manual_seed(0)
    counts, seen = torch.zeros(C + 1), torch.zeros(C)
    for _ in range(2000):
        taken = sample_channels(C)
        assert (taken.diff() > 0).all()
        counts[len(taken)] += 1
        seen[taken] += 1
    # 4 standard deviations of 2000 draws of probability 1/4 and 5/8
    assert (counts[1:] / 2000 - 1 / 4).abs().max() < 0.04
    assert (seen / 2000 - 5 / 8).abs().max() < 0.044
    layer = embedding()
    tokens, channels = layer(images())
    torch.testing.assert_close(tokens, by_loops(layer, images()[:, channels[0]], channels.tolist()))
    assert embedding(sampling=False)(images())[0].shape == (B, 6 * C, D)


@pytest.mark.parametrize("sign", [1, -1])
def test_layer_attention_is_the_published_one(sign):
    layer = LayerAttention(sign=sign, dtype=torch.float64)
    x = (0.3 * randn(B, 3, 2, 4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.equal(layer(x), x.flatten(1, 2))
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    rows = []
    for maps in x:
        scores = torch.stack([torch.stack([(a * b).sum() for b in maps]) for a in maps])
        if sign == -1:
            scores = scores.amax(1, keepdim=True) - scores
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        for i in range(3):
            rows.append(layer.gamma * sum(weights[i, j] * maps[j] for j in range(3)) + maps[i])
    truth = torch.cat(rows).view(B, 6, 4, 5)
    out = layer(x)
    torch.testing.assert_close(out, truth)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (x, layer.gamma)),
        torch.autograd.grad(truth.square().sum(), (x, layer.gamma)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_channel_spatial_attention_is_the_published_one():
    torch.manual_seed(0)
    layer = ChannelSpatialAttention(3, dtype=torch.float64)
    x = randn(B, 3, 4, 5, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    torch.nn.init.constant_(layer.gamma, 0.7)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1, 1, 1))
    truth = x.clone()
    for c in range(3):
        for i in range(4):
            for j in range(5):
                near = padded[:, c : c + 3, i : i + 3, j : j + 3]
                score = (near * layer.conv.weight[0, 0]).sum((1, 2, 3)) + layer.conv.bias
                truth[:, c, i, j] = x[:, c, i, j] * (1 + 0.7 * score.sigmoid()).detach()
    torch.testing.assert_close(layer(x), truth)


@pytest.mark.parametrize(
    "error, match, make",
    [
        (ValueError, "image_size", lambda: ChannelPatchEmbedding(5, 2, C, D)),
        (ValueError, "num_channels", lambda: ChannelPatchEmbedding(4, 2, 0, D)),
        (ValueError, "x must", lambda: embedding()(images()[..., 1:])),
        (ValueError, "channels must", lambda: embedding()(images(2))),
        (ValueError, "channels must", lambda: embedding()(images(1), torch.tensor([[0], [C]]))),
        (TypeError, "channels must", lambda: embedding()(images(1), torch.ones(B, 1))),
        (ValueError, "sign", lambda: LayerAttention(sign=0)),
        (ValueError, "x must", lambda: LayerAttention()(torch.ones(2, 3, 4, 5))),
        (ValueError, "channels", lambda: ChannelSpatialAttention(0)),
        (ValueError, "x must", lambda: ChannelSpatialAttention(3)(torch.ones(2, 4, 4, 4))),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()
