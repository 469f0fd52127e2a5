"""Attention between two streams, against the matrices of both and PyTorch's module."""

import pytest
import torch
from torch.nn import functional as F

from weft.masks import Causal
from weft.nn import CompositionBridge, MultiwayBlock, alignment_mask
from weft.ops.cases import randn

B, N, M, C, H = 2, 5, 4, 12, 3
VIDEO = torch.tensor([[-1, 0, 0, 1, 2], [-1, 3, 3, 3, -1]])
TEXT = torch.tensor([[-1, 0, 1, 2], [-1, 2, 3, 4]])
VIDEO_VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
TEXT_VALID = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()


def tensor(*shape, seed=0):
    return randn(*shape, dtype=torch.float64, seed=seed).requires_grad_()


def check(out, truth, inputs):
    torch.testing.assert_close(out, truth)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def published_mask(padded=True):
    """Filled as in the published code: both modalities, then what is aligned."""
    mask = torch.zeros(B, N + M, N + M, dtype=torch.bool)
    for b in range(B):
        mask[b, :N, :N] = VIDEO_VALID[b] if padded else True
        mask[b, N:, N:] = TEXT_VALID[b] if padded else True
        for i in range(N):
            for j in range(M):
                together = VIDEO[b, i] >= 0 and VIDEO[b, i] == TEXT[b, j]
                mask[b, i, N + j] = together and (not padded or TEXT_VALID[b, j])
                mask[b, N + j, i] = together and (not padded or VIDEO_VALID[b, i])
    return mask


def test_alignment_mask_is_the_published_one():
    shape = (B, 1, N + M, N + M)
    mask = alignment_mask(VIDEO, TEXT, video_valid=VIDEO_VALID, text_valid=TEXT_VALID)
    assert torch.equal(mask.to_dense(shape)[:, 0], published_mask())
    assert torch.equal(alignment_mask(VIDEO, TEXT).to_dense(shape)[:, 0], published_mask(False))


def test_multiway_block_is_the_published_one():
    torch.manual_seed(0)
    block = MultiwayBlock(C, H, 7, dropout=0.0, dtype=torch.float64)
    video, text = tensor(B, N, C), tensor(B, M, C, seed=1)
    mask = alignment_mask(VIDEO, TEXT, video_valid=VIDEO_VALID, text_valid=TEXT_VALID)
    x = torch.cat([video, text], 1)
    peer = torch.nn.MultiheadAttention(C, H, batch_first=True, dtype=torch.float64)
    state = {"in_proj_weight": block.qkv.weight, "in_proj_bias": block.qkv.bias}
    state |= {"out_proj.weight": block.proj.weight, "out_proj.bias": block.proj.bias}
    peer.load_state_dict({name: value.detach() for name, value in state.items()})
    y = block.norm1(x)
    hidden = ~published_mask().repeat_interleave(H, 0)
    x = x + peer(y, y, y, attn_mask=hidden)[0]
    streams = []
    for part, (norm, fc1, _, _, fc2, _) in ((x[:, :N], block.video), (x[:, N:], block.text)):
        streams.append(part + fc2(F.gelu(fc1(norm(part)))))
    out = torch.cat(block(video, text, mask=mask), 1)
    check(out, torch.cat(streams, 1), [video, text, *block.video.parameters()])


@pytest.mark.parametrize("mask", [None, Causal()])
def test_bridge_is_the_papers(mask):
    torch.manual_seed(0)
    bridge = CompositionBridge(C, 7, H, dtype=torch.float64)
    x, other = tensor(B, N, C), tensor(B, M, 7, seed=1)
    projected = other @ bridge.project.weight.mT
    parts = []
    for q, k, v in zip(
        (x @ bridge.query.weight.mT).split(C // H, -1),
        (projected @ bridge.key.weight.mT).split(C // H, -1),
        (projected @ bridge.value.weight.mT).split(C // H, -1),
        strict=True,
    ):
        scores = q @ k.mT / (C // H) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~torch.ones(N, M).tril().bool(), -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    truth = x + torch.cat(parts, -1) @ bridge.out.weight.mT
    check(bridge(x, other, mask=mask), truth, [x, other, *bridge.parameters()])


@pytest.mark.parametrize(
    "error, match, make",
    [
        (TypeError, "text_segments", lambda: alignment_mask(VIDEO, TEXT.double())),
        (ValueError, "text_segments", lambda: alignment_mask(VIDEO, TEXT[:1])),
        (TypeError, "video_valid", lambda: alignment_mask(VIDEO, TEXT, video_valid=VIDEO)),
        (ValueError, "text_valid", lambda: alignment_mask(VIDEO, TEXT, text_valid=VIDEO_VALID)),
        (ValueError, "dropout", lambda: MultiwayBlock(C, H, dropout=1.0)),
        (ValueError, "text", lambda: MultiwayBlock(C, H)(torch.ones(B, N, C), torch.ones(1, M, C))),
        (ValueError, "other_dim", lambda: CompositionBridge(C, 0, H)),
        (
            ValueError,
            "other",
            lambda: CompositionBridge(C, 7, H)(torch.ones(B, N, C), torch.ones(B, M, C)),
        ),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()
