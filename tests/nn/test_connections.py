"""Connections of several streams against the formulas token by token, and against DeepSeek V4's."""

import pytest
import torch

from weft.nn import DoublyStochasticConnections
from weft.ops.cases import randn


def randomized(n=3, C=5, dtype=torch.float64, **options):
    layer = DoublyStochasticConnections(C, n, **options).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * randn(*parameter.shape, dtype=dtype, seed=seed))
    return layer


def by_token(layer, x, function):
    """The published formulas for one token at a time."""
    n = layer.streams
    out = []
    for token in x:
        flat = token.flatten()
        flat = flat / (flat.square().mean() + layer.norm_eps).sqrt()
        logits = layer.weight @ flat
        p = (layer.scale[0] * logits[:n] + layer.bias[:n]).sigmoid()
        q = 2 * (layer.scale[1] * logits[n : 2 * n] + layer.bias[n : 2 * n]).sigmoid()
        R = (layer.scale[2] * logits[2 * n :] + layer.bias[2 * n :]).view(n, n).exp()
        for _ in range(layer.iterations):
            R = R / R.sum(0, keepdim=True)
            R = R / R.sum(1, keepdim=True)
        out.append(R @ token + q[:, None] * function(p @ token))
    return torch.stack(out)


def test_connections_are_the_formulas():
    layer, x = randomized(), randn(4, 3, 5, dtype=torch.float64, seed=9).requires_grad_()
    leaves = [x, *layer.parameters()]
    found, expected = layer(x, torch.tanh), by_token(layer, x, torch.tanh)
    torch.testing.assert_close(found, expected)
    upstream = randn(4, 3, 5, dtype=torch.float64, seed=4)
    grads = [torch.autograd.grad(y, leaves, upstream) for y in (found, expected)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_stabilized_connections_are_those_of_deepseek():
    """The transformers library's order of steps; its matrix is the transpose of R."""
    n, eps = 4, 1e-3
    layer = randomized(n, 6, iterations=7, stabilizer=eps)
    x = randn(2, 3, n, 6, dtype=torch.float64)
    flat = x.flatten(2)
    flat = flat * (flat.square().mean(-1, keepdim=True) + layer.norm_eps).rsqrt()
    pre, post, comb = (flat @ layer.weight.T).split([n, n, n * n], -1)
    pre_bias, post_bias, comb_bias = layer.bias.split([n, n, n * n])
    pre = (pre * layer.scale[0] + pre_bias).sigmoid() + eps
    post = 2 * (post * layer.scale[1] + post_bias).sigmoid()
    comb = (comb * layer.scale[2] + comb_bias).view(2, 3, n, n).mT.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(6):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    out = torch.tanh((pre[..., None] * x).sum(2))
    expected = comb.mT @ x + post[..., None] * out[..., None, :]
    torch.testing.assert_close(layer(x, torch.tanh), expected)


def test_begins_as_a_residual_connection():
    layer = DoublyStochasticConnections(8, 4)
    x = randn(5, 1, 8).expand(5, 4, 8)
    torch.testing.assert_close(layer(x, torch.tanh), x + x.tanh(), atol=0.05, rtol=0.05)


def test_means_of_streams_are_kept():
    """Rows and columns of R sum to 1: without a layer the mean over streams stays."""
    layer, x = randomized(iterations=200), randn(7, 3, 5, dtype=torch.float64)
    _, _, R = layer.weights(x)
    for dim in (-1, -2):
        torch.testing.assert_close(R.sum(dim), torch.ones(7, 3, dtype=torch.float64))
    torch.testing.assert_close(layer(x, torch.zeros_like).mean(1), x.mean(1))


def test_half_precision_keeps_its_dtype():
    layer = DoublyStochasticConnections(8, 4)
    x = randn(3, 4, 8)
    found = layer(x.bfloat16(), lambda y: y)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x, lambda y: y), atol=0.05, rtol=0.05)


def test_refuses():
    for match, call in {
        "streams must be >= 2": lambda: DoublyStochasticConnections(8, 1),
        "features must be an integer": lambda: DoublyStochasticConnections(0),
        r"x must be \(\.\.\., 4, 8\)": lambda: DoublyStochasticConnections(8)(
            torch.ones(3, 8), abs
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
