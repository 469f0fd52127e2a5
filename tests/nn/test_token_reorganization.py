"""EViT's blocks against its formulas, one token at a time, and against timm's block."""

import pytest
import torch
from peers import import_timm
from torch.nn import functional as F

from weft.nn import ClassAttention, EViTBlock, TokenPruning, pack_tokens, prune_tokens
from weft.ops.cases import randn

B, N, C, H = 2, 9, 12, 3


def tokens(seed=0, length=1 + N):
    return randn(B, length, C, dtype=torch.float64, seed=seed)


def published(block, x, keep, fuse):
    """One sample and one head at a time."""
    results, indices = [], []
    for sample in x:
        y = block.norm1(sample)
        q, k, v = (t.unflatten(-1, (H, -1)) for t in block.attn.qkv(y).chunk(3, -1))
        heads, attentiveness = [], 0
        for h in range(H):
            p = (q[:, h] @ k[:, h].mT / (C // H) ** 0.5).softmax(-1)
            heads.append(p @ v[:, h])
            attentiveness = attentiveness + p[0, 1:] / H
        z = sample + block.attn.proj(torch.cat(heads, -1))
        patches = sorted(range(N), key=lambda i: -attentiveness[i].item())
        rows = [z[0]] + [z[1 + i] for i in patches[:keep]]
        if fuse and keep < N:
            rows.append(sum(attentiveness[i] * z[1 + i] for i in patches[keep:]))
        z = torch.stack(rows)
        hidden = F.gelu(block.mlp.fc1(block.norm2(z)))
        results.append(z + block.mlp.fc2(hidden))
        indices.append(torch.tensor(patches[:keep]))
    return torch.stack(results), torch.stack(indices)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("keep, count", [(0.5, 5), (3, 3), (0.01, 1)])
def test_evit_block_is_the_published_one(keep, count, fuse):
    torch.manual_seed(0)
    block = EViTBlock(C, H, keep, fuse=fuse, dtype=torch.float64)
    x = tokens().requires_grad_()
    out, kept = block(x)
    truth, indices = published(block, x, count, fuse)
    assert out.shape == (B, 1 + count + fuse, C) and torch.equal(kept, indices)
    torch.testing.assert_close(out, truth)
    inputs = [x, *block.parameters()]
    upstream = randn(*out.shape, dtype=torch.float64, seed=5)
    for a, b in zip(
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(truth, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_block_that_keeps_all_is_timms():
    import_timm()
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    peer = Block(C, H, qkv_bias=True, norm_layer=torch.nn.LayerNorm).double()
    block = EViTBlock(C, H, 1.0, dtype=torch.float64)
    block.load_state_dict(peer.state_dict())
    peer.norm1.eps = peer.norm2.eps = 1e-6
    out, kept = block(tokens())
    torch.testing.assert_close(out, peer(tokens()))
    assert torch.equal(kept, torch.arange(N).expand(B, N))


def test_prune_tokens():
    x, scores = tokens(length=N), randn(B, N, dtype=torch.float64, seed=3)
    scores[:, 4] = scores[:, 2]
    out, kept = prune_tokens(x, scores, 4, fuse=True)
    for b in range(B):
        order = sorted(range(N), key=lambda i: (-scores[b, i].item(), i))
        assert kept[b].tolist() == order[:4]
        rest = sum(scores[b, i] * x[b, i] for i in order[4:])
        torch.testing.assert_close(out[b], torch.stack([x[b, i] for i in order[:4]] + [rest]))
    assert torch.equal(prune_tokens(x, scores, 4)[0], out[:, :4])
    everything, kept = prune_tokens(x, scores, N, fuse=True)
    assert torch.equal(everything, x) and torch.equal(kept[0], torch.arange(N))


def test_two_leading_tokens_stay():
    x, scores = tokens(length=2 + N), randn(B, N, dtype=torch.float64, seed=3)
    out, kept = TokenPruning(4, fuse=False, leading=2)(x, scores)
    assert torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(out[0, 2:], x[0, 2 + kept[0]])
    assert TokenPruning(40, leading=0)(x, x[..., 0])[0].shape == x.shape


def test_packed_samples_are_each_on_its_own():
    torch.manual_seed(0)
    layer = ClassAttention(C, H, dtype=torch.float64)
    x = randn(3, 1 + N, C, dtype=torch.float64).requires_grad_()
    keep = randn(3, 1 + N, seed=1) > 0.2
    keep[:, 0] = True
    keep[2, 1:] = False
    packed = pack_tokens(x, keep)
    assert packed.max_length == keep.sum(1).max() and len(packed.split()[2]) == 1
    out, attentiveness = layer.packed(packed)
    alone = [layer(sample[kept][None]) for sample, kept in zip(x, keep, strict=True)]
    torch.testing.assert_close(out.tokens, torch.cat([y[0] for y, _ in alone]))
    for own, (_, paid) in zip(packed.with_tokens(attentiveness).split(), alone, strict=True):
        torch.testing.assert_close(own[1:], paid[0])
        torch.testing.assert_close(own.sum(), torch.ones(()).double())
    (ours,) = torch.autograd.grad(out.tokens.square().sum(), x)
    (truth,) = torch.autograd.grad(sum(y.square().sum() for y, _ in alone), x)
    torch.testing.assert_close(ours, truth)
    with pytest.raises(TypeError, match="keep"):
        pack_tokens(x, keep.long())
    with pytest.raises(ValueError, match="keep"):
        pack_tokens(x, keep[:, 1:])


def test_half_precision():
    torch.manual_seed(0)
    block = EViTBlock(C, H, 4)
    x = randn(B, 1 + N, C).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, kept = block(x)
    out.float().square().sum().backward()
    assert x.grad.isfinite().all() and kept.shape == (B, 4)
    exact, _ = EViTBlock.forward(block, x)
    assert exact.dtype == torch.float32
    attended, attentiveness = ClassAttention(C, H).bfloat16()(x.detach().bfloat16())
    assert attended.dtype == torch.bfloat16 and attentiveness.dtype == torch.float32


def test_compiles():
    block = EViTBlock(C, H, 0.5)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = randn(B, 1 + N, C)
    for ours, eager in zip(compiled(x), block(x), strict=True):
        torch.testing.assert_close(ours, eager)
    compiled(x)[0].sum().backward()


@pytest.mark.parametrize(
    "error, match, make",
    [
        (ValueError, "multiple of num_heads", lambda: ClassAttention(10, 3)),
        (ValueError, "keep", lambda: TokenPruning(0.0)),
        (ValueError, "keep", lambda: TokenPruning(1.5)),
        (ValueError, "keep", lambda: TokenPruning(0)),
        (ValueError, "leading", lambda: TokenPruning(1, leading=-1)),
        (ValueError, "x must be", lambda: EViTBlock(C, H)(torch.ones(B, 4, C + 1))),
        (ValueError, "more than 1", lambda: EViTBlock(C, H)(torch.ones(B, 1, C))),
        (TypeError, "x must be", lambda: EViTBlock(C, H)(torch.ones(B, 4, C, dtype=torch.int64))),
        (ValueError, "scores", lambda: prune_tokens(torch.ones(B, 4, C), torch.ones(B, 3), 2)),
        (ValueError, "from 1 to 4", lambda: prune_tokens(torch.ones(B, 4, C), torch.ones(B, 4), 5)),
        (TypeError, "keep", lambda: prune_tokens(torch.ones(B, 4, C), torch.ones(B, 4), 0.5)),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()
