"""TransNeXt's attentions against their formulas: one softmax over all keys of a place."""

import math

import pytest
import torch
from torch.nn import functional as F

from weft.nn import AggregatedAttention, LengthScaledCosineAttention
from weft.ops.cases import randn

B, DIM, HEADS = 2, 6, 2
D = DIM // HEADS


def layer_of(size, kind=AggregatedAttention, **options):
    torch.manual_seed(0)
    layer = kind(DIM, size, HEADS, dtype=torch.float64, **options)
    for name, parameter in layer.named_parameters():
        if name != "temperature":
            torch.nn.init.normal_(parameter, std=0.5)
    return layer


def coordinate(place, pooled, size, pool_size, pretrained):
    """Log-spaced distance along one axis, of a place and the center of a pooling cell."""
    start = math.floor(pooled * size / pool_size)
    end = math.ceil((pooled + 1) * size / pool_size)
    center = sum(range(start, end)) / (end - start)
    offset = (place - center) / (pretrained - 1) * 8
    return math.copysign(math.log2(abs(offset) + 1) / 3, offset)


def aggregated(layer, x, size, pretrained):
    """The formula, one image, place and head at a time."""
    (H, W), (h, w), radius = size, layer.pool_size, layer.window // 2
    pooled_places = [(r, c) for r in range(h) for c in range(w)]
    outputs = []
    for image in x:
        grid = F.gelu(F.conv2d(image.T.reshape(1, DIM, H, W), layer.sr.weight, layer.sr.bias))
        cells = F.adaptive_avg_pool2d(grid, (h, w))[0].flatten(1).T
        pooled = layer.kv(layer.norm(cells)).view(h * w, 2, HEADS, D)
        own = layer.kv(image).view(H * W, 2, HEADS, D)
        queries = layer.q(image).view(H * W, HEADS, D)
        for i in range(H * W):
            y, z = divmod(i, W)
            heads = []
            for head in range(HEADS):
                unit = queries[i, head] / queries[i, head].norm()
                near = [
                    (o, (y + o // layer.window - radius) * W + z + o % layer.window - radius)
                    for o in range(layer.window**2)
                    if 0 <= y + o // layer.window - radius < H
                    and 0 <= z + o % layer.window - radius < W
                ]
                count = math.log(len(near) + h * w)
                tau = (1 + layer.temperature[head, 0, 0].exp()).log()
                query = (unit + layer.query_embedding[head, 0]) * tau * count
                scores, values = [], []
                for o, j in near:
                    key = own[j, 0, head] / own[j, 0, head].norm()
                    scores.append(query @ key + layer.relative_pos_bias_local[head, o])
                    values.append(own[j, 1, head])
                for j, (r, c) in enumerate(pooled_places):
                    key = pooled[j, 0, head] / pooled[j, 0, head].norm()
                    place = torch.tensor(
                        [
                            coordinate(y, r, H, h, pretrained[0]),
                            coordinate(z, c, W, w, pretrained[1]),
                        ],
                        dtype=torch.float64,
                    )
                    bias = layer.cpb_fc2(torch.relu(layer.cpb_fc1(place)))[head]
                    scores.append(query @ key + bias)
                    values.append(pooled[j, 1, head])
                weights = torch.stack(scores).softmax(0)
                out = (weights[:, None] * torch.stack(values)).sum(0)
                for (o, _), v in zip(near, values, strict=False):
                    token = unit @ layer.learnable_tokens[head, :, o]
                    out = out + (token + layer.learnable_bias[head, 0, o]) * v
                heads.append(out)
            outputs.append(layer.proj(torch.cat(heads)))
    return torch.stack(outputs).view(x.shape)


@pytest.mark.parametrize(
    "size, window, pool, pretrained",
    [((4, 5), 3, 2, None), ((3, 4), 5, 1, (2, 9)), ((6, 4), 3, 4, (3, 2))],
)
def test_is_one_softmax(size, window, pool, pretrained):
    layer = layer_of(size, window=window, pool=pool, pretrain_size=pretrained)
    x = randn(B, size[0] * size[1], DIM, dtype=torch.float64).requires_grad_()
    assert_same(layer, x, layer(x), aggregated(layer, x, size, pretrained or size))


def assert_same(layer, x, ours, expected):
    torch.testing.assert_close(ours, expected)
    upstream = randn(*x.shape, dtype=torch.float64, seed=3)
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size, pretrained", [((3, 4), None), ((4, 2), (3, 5))])
def test_length_scaled_cosine(size, pretrained):
    layer = layer_of(size, LengthScaledCosineAttention, pretrain_size=pretrained)
    (H, W), (h, w) = size, pretrained or size
    N = H * W
    x = randn(B, N, DIM, dtype=torch.float64).requires_grad_()
    places = torch.tensor(
        [
            [
                [coordinate(i // W, j // W, H, H, h), coordinate(i % W, j % W, W, W, w)]
                for j in range(N)
            ]
            for i in range(N)
        ],
        dtype=torch.float64,
    )
    bias = layer.cpb_fc2(torch.relu(layer.cpb_fc1(places))).permute(2, 0, 1)
    q, k, v = layer.qkv(x).view(B, N, 3, HEADS, D).permute(2, 0, 3, 1, 4)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    tau = (1 + layer.temperature.exp()).log()
    scores = torch.einsum("bhid,bhjd->bhij", q + layer.query_embedding, k)
    weights = (tau * math.log(N) * scores + bias).softmax(-1)
    expected = layer.proj(torch.einsum("bhij,bhjd->bihd", weights, v).reshape(B, N, DIM))
    assert_same(layer, x, layer(x), expected)


def test_begins_as_published():
    layer = AggregatedAttention(DIM, 4, HEADS, pool=2)
    torch.testing.assert_close(F.softplus(layer.temperature), torch.full((HEADS, 1, 1), 1 / 0.24))
    assert not layer.learnable_bias.any()
    names = {name.partition(".")[0] for name in layer.state_dict()}
    assert names == {
        *("temperature", "query_embedding", "learnable_tokens", "learnable_bias"),
        *("relative_pos_bias_local", "q", "kv", "proj", "sr", "norm", "cpb_fc1", "cpb_fc2"),
    }


def test_refuses():
    for match, make in [
        ("dim must be", lambda: AggregatedAttention(8, 4, 3)),
        ("input_size must be", lambda: AggregatedAttention(8, 0, 2)),
        ("window must be odd", lambda: AggregatedAttention(8, 4, 2, 2, 2)),
        ("pool must be", lambda: AggregatedAttention(8, (4, 8), 2, 3, 5)),
        ("pretrain_size must be", lambda: AggregatedAttention(8, 4, 2, 3, 2, pretrain_size=(0, 1))),
        ("x must be", lambda: LengthScaledCosineAttention(8, 4, 2)(randn(2, 15, 8))),
        ("x must be", lambda: AggregatedAttention(8, 4, 2, 3, 2)(randn(2, 15, 8))),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
