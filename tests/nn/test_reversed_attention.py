"""Reversed attention against its matrices in float64, and what is conserved by it."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import DependencyBlock, ReversedAttention, prune_tokens, reversed_attention
from weft.ops.cases import randn

B, H, N, C = 2, 3, 7, 12


def tensors(*shapes):
    return [
        randn(*shape, dtype=torch.float64, seed=i).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def by_loops(query, key, value, weight, scale):
    """Every child sends to every parent."""
    out = [[0] * key.shape[2] for _ in range(B * H)]
    for n in range(B * H):
        b, h = divmod(n, H)
        for i in range(query.shape[2]):
            p = torch.softmax(scale * key[b, h] @ query[b, h, i], 0)
            for j in range(key.shape[2]):
                out[n][j] = out[n][j] + p[j] * weight[b, h % weight.shape[1], i] * value[b, h, i]
    return torch.stack([torch.stack(rows) for rows in out]).view(B, H, key.shape[2], -1)


@pytest.mark.parametrize("heads", [1, H])
def test_is_attention_with_transposed_weights(heads):
    inputs = tensors((B, H, 5, 4), (B, H, N, 4), (B, H, 5, 3), (B, heads, 5))
    query, key, value, weight = inputs
    out = reversed_attention(query, key, value, weight=weight, scale=0.8)
    truth = by_loops(query, key, value, weight, 0.8)
    torch.testing.assert_close(out, truth)
    upstream = randn(*out.shape, dtype=torch.float64, seed=9)
    for a, b in zip(
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(truth, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_what_is_sent_is_received():
    """Also where scores are so large that every child has one parent, and most parents none."""
    query, key, value = tensors((B, H, N, 4), (B, H, N, 4), (B, H, N, 3))
    for scale in (1.0, 1e4):
        out = reversed_attention(query, key, value, scale=scale)
        torch.testing.assert_close(out.sum(2), value.sum(2))
    parents = (query @ key.mT).argmax(-1)
    expected = torch.zeros_like(value).scatter_add(2, parents[..., None].expand_as(value), value)
    torch.testing.assert_close(out, expected)


def test_single_precision():
    inputs = [t.detach() for t in tensors((B, H, N, 4), (B, H, N, 4), (B, H, N, 3))]
    truth = reversed_attention(*inputs, scale=10.0)
    single = reversed_attention(*(t.float() for t in inputs), scale=10.0)
    torch.testing.assert_close(single.double(), truth, rtol=1e-4, atol=1e-4)


def published(layer, x, message):
    """A^R, one sample and head at a time, and what it gives."""
    dim = C // H
    q, k, v = layer.qkv(x).chunk(3, -1)
    p = F.softmax(layer.head_selector(x) / layer.temperature, -1)
    hidden = F.gelu(layer.message_controller.fc1(x))
    m = message * torch.sigmoid(layer.message_controller.fc2(hidden))[..., 0]
    reverse = torch.zeros(B, H, N, N, dtype=torch.float64)
    outs = []
    for b in range(B):
        rows = []
        for h in range(H):
            part = slice(h * dim, (h + 1) * dim)
            forward = torch.softmax(q[b, :, part] @ k[b, :, part].mT / dim**0.5, 1)
            reverse[b, h] = forward.mT * p[b, :, h] * m[b]
            rows.append((forward.mT * p[b, :, h] * m[b]) @ v[b, :, part])
        outs.append(layer.proj(torch.cat(rows, -1)))
    return torch.stack(outs), m, reverse


def test_layer_is_the_published_one():
    torch.manual_seed(0)
    layer = ReversedAttention(C, H, temperature=0.5, dtype=torch.float64)
    x, message = tensors((B, N, C), (B, N))
    out, sent = layer(x, message)
    truth, m, reverse = published(layer, x, message)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(sent, m)
    torch.testing.assert_close(layer.dependency(x, message), reverse.sum(1))
    inputs = [x, message, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_message_is_what_a_token_sends():
    torch.manual_seed(0)
    layer = ReversedAttention(C, H, dtype=torch.float64)
    (x,) = tensors((B, N, C))
    _, message = layer(x)
    torch.testing.assert_close(layer.dependency(x).sum(1), message)


def test_block_prunes_leaves():
    torch.manual_seed(0)
    block = DependencyBlock(C, H, 0.5, dtype=torch.float64)
    x, message = tensors((B, N, C), (B, N))
    y, sent, _ = published(block.attn, block.norm1(x), message)
    z, kept = prune_tokens(x + y, sent, 4)
    truth = z + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(z))))
    out, left, indices = block(x, message)
    torch.testing.assert_close(out, truth)
    assert torch.equal(indices, kept) and (left.diff() <= 0).all()
    torch.testing.assert_close(left, sent.gather(1, kept))


def test_compiles_and_half_precision():
    torch.manual_seed(0)
    block = DependencyBlock(C, H, 5)
    x = randn(B, N, C)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(x), block(x), strict=True):
        torch.testing.assert_close(ours, eager)
    compiled(x)[0].sum().backward()
    layer = block.attn.bfloat16()
    out, message = layer(x.bfloat16())
    assert out.dtype == message.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "error, match, make",
    [
        (ValueError, "temperature", lambda: ReversedAttention(C, H, temperature=0.0)),
        (ValueError, "multiple", lambda: ReversedAttention(C, 5)),
        (ValueError, "keep", lambda: DependencyBlock(C, H, 2.0)),
        (ValueError, "x must", lambda: ReversedAttention(C, H)(torch.ones(B, N, 1))),
        (
            ValueError,
            "message",
            lambda: ReversedAttention(C, H)(torch.ones(B, N, C), torch.ones(B, 1)),
        ),
        (ValueError, "query", lambda: reversed_attention(*[torch.ones(2, 3, 4)] * 3)),
        (
            ValueError,
            "value",
            lambda: reversed_attention(*[torch.ones(1, 2, 3, 4)] * 2, torch.ones(1, 2, 5, 4)),
        ),
        (
            ValueError,
            "weight",
            lambda: reversed_attention(*[torch.ones(1, 2, 3, 4)] * 3, weight=torch.ones(1, 2, 2)),
        ),
        (
            TypeError,
            "value",
            lambda: reversed_attention(
                *[torch.ones(1, 2, 3, 4)] * 2, torch.ones(1, 2, 3, 4, dtype=torch.int64)
            ),
        ),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()
