"""The memory read of XMem and ColorMNet against its formula, pair by pair."""

import math

import pytest
import torch

from weft.nn import memory_read
from weft.ops.cases import randn

B, C, V, T = 2, 3, 4, 2


def inputs(dtype=torch.float64):
    shapes = [(C, 2, 3), (C, 2, 3), (C, T, 3, 2), (1, T, 3, 2), (V, T, 3, 2)]
    query, selection, key, shrinkage, value = (
        randn(B, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)
    )
    return [query, selection.sigmoid(), key, 1 + shrinkage.square(), value]


def formula(query, selection, key, shrinkage, value):
    q, e, k, s, v = (t.flatten(2) for t in (query, selection, key, shrinkage, value))
    scores = [
        [
            [
                -s[b, 0, j] / math.sqrt(C) * (e[b, :, i] * (k[b, :, j] - q[b, :, i]) ** 2).sum()
                for j in range(k.shape[2])
            ]
            for i in range(q.shape[2])
        ]
        for b in range(B)
    ]
    scores = torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in scores])
    weights = scores.softmax(2)
    out = torch.einsum("bij,bvj->bvi", weights, v).view(B, V, *query.shape[2:])
    return out, weights.sum(1).view(B, *key.shape[2:])


def test_is_the_formula():
    given = [t.requires_grad_() for t in inputs()]
    ours, expected = memory_read(*given, return_usage=True), formula(*given)
    upstream = [randn(*t.shape, dtype=torch.float64, seed=9 + i) for i, t in enumerate(ours)]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(ours, given, upstream),
        torch.autograd.grad(expected, given, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert torch.equal(memory_read(*given), ours[0])


def test_mixed_precision_computes_in_float32():
    given = inputs(torch.float32)
    expected, usage = memory_read(*given, return_usage=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(memory_read(*given), expected)
    out, count = memory_read(*(t.bfloat16() for t in given), return_usage=True)
    assert out.dtype == torch.bfloat16 and count.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(usage.sum(), torch.tensor(2.0 * B * 3))


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(memory_read, fullgraph=True, backend="aot_eager")
    given = inputs(torch.float32)
    torch.testing.assert_close(compiled(*given), memory_read(*given))


def test_refuses():
    query, selection, key, shrinkage, value = inputs()
    for match, make in [
        ("query and selection", lambda: memory_read(query, key, key, shrinkage, value)),
        ("key must be", lambda: memory_read(query, selection, key[:, 1:], shrinkage, value)),
        ("key must be", lambda: memory_read(query, selection, key[:, :, :0], shrinkage, value)),
        ("shrinkage must be", lambda: memory_read(query, selection, key, key, value)),
        ("value must be", lambda: memory_read(query, selection, key, shrinkage, value[:1])),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(TypeError, match="value must be"):
        memory_read(query, selection, key, shrinkage, value.long())
