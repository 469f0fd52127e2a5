"""Polarized self-attention against its equations, one channel and one place at a time."""

import math

import pytest
import torch

from weft.nn import PolarizedSelfAttention
from weft.ops.cases import randn

B, C, H, W = 2, 6, 3, 4


def convolved(conv, x, out, h, w):
    return conv.bias[out] + sum(conv.weight[out, c, 0, 0] * x[c, h, w] for c in range(x.shape[0]))


def softmax(values):
    exps = torch.stack(values).exp()
    return exps / exps.sum()


def channel_gate(gate, x):
    """``(C,)`` of one map ``(C, H, W)``."""
    places = [(h, w) for h in range(H) for w in range(W)]
    weights = softmax([convolved(gate.query, x, 0, h, w) for h, w in places])
    pooled = [
        sum(
            p * convolved(gate.value, x, c, h, w) for p, (h, w) in zip(weights, places, strict=True)
        )
        for c in range(C // 2)
    ]
    z = torch.stack([gate.out.bias[c] + gate.out.weight[c, :, 0, 0] @ torch.stack(pooled)
                     for c in range(C)])  # fmt: skip
    z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * gate.norm.weight + gate.norm.bias
    return 1 / (1 + torch.exp(-z))


def spatial_gate(gate, x):
    """``(H, W)`` of one map ``(C, H, W)``."""
    rows, columns = range(H), range(W)
    means = [
        sum(convolved(gate.query, x, c, h, w) for h in rows for w in columns) / (H * W)
        for c in range(C // 2)
    ]
    weights = softmax(means)
    z = [[sum(weights[c] * convolved(gate.value, x, c, h, w) for c in range(C // 2))
          for w in columns] for h in rows]  # fmt: skip
    return 1 / (1 + torch.exp(-torch.stack([torch.stack(row) for row in z])))


def polarized(layer, x):
    outputs = []
    for one in x:
        gated = one * channel_gate(layer.channel, one)[:, None, None]
        if layer.layout == "parallel":
            outputs.append(gated + one * spatial_gate(layer.spatial, one))
        else:
            outputs.append(gated * spatial_gate(layer.spatial, gated))
    return torch.stack(outputs)


@pytest.mark.parametrize("layout", ["parallel", "sequential"])
def test_is_the_formula(layout):
    torch.manual_seed(0)
    layer = PolarizedSelfAttention(C, layout, dtype=torch.float64)
    for parameter in layer.parameters():  # also those of the layer norm
        torch.nn.init.normal_(parameter)
    x = randn(B, C, H, W, dtype=torch.float64, seed=1).requires_grad_()
    upstream = randn(B, C, H, W, dtype=torch.float64, seed=2)
    inputs = [x, *layer.parameters()]
    ours, expected = layer(x), polarized(layer, x)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_equal_channels_and_places_have_equal_gates():
    """Of a constant map, the softmax over places is uniform: gates in closed form."""
    layer = PolarizedSelfAttention(C, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.full((1, C, H, W), 3.0, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x)  # both gates are sigmoid(0)
    torch.nn.init.ones_(layer.spatial.value.bias)
    torch.nn.init.constant_(layer.channel.norm.bias, -1.0)
    gates = 1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(1))
    torch.testing.assert_close(layer(x), x * gates)


def test_refuses():
    for match, make in [
        ("channels must be", lambda: PolarizedSelfAttention(5)),
        ("layout must be", lambda: PolarizedSelfAttention(4, "both")),
        ("x must be", lambda: PolarizedSelfAttention(4)(randn(2, 5, 3, 3))),
        ("x must be", lambda: PolarizedSelfAttention(4)(randn(2, 4, 0, 3))),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(TypeError, match="x must be"):
        PolarizedSelfAttention(4)(torch.ones(2, 4, 3, 3, dtype=torch.int64))
