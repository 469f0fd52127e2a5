"""CrossViT's attention, block and fusion against timm's modules of the same weights."""

import pytest
import torch
from peers import import_timm

from weft.nn import ClassCrossAttention, ClassCrossAttentionBlock, CrossScaleFusion
from weft.ops.cases import randn


def assert_same(layer, peer, ours, expected, tensors):
    state = dict(peer.named_parameters())
    theirs = [*tensors, *(state[name] for name, _ in layer.named_parameters())]
    mine = [*tensors, *layer.parameters()]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    upstream = [randn(*t.shape, dtype=torch.float64, seed=3 + i) for i, t in enumerate(ours)]
    for a, b in zip(
        torch.autograd.grad(ours, mine, upstream),
        torch.autograd.grad(expected, theirs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("block", [True, False])
def test_attention_is_timms(block, qkv_bias):
    import_timm()
    from timm.models import crossvit

    torch.manual_seed(0)
    kind, peer = ClassCrossAttention, crossvit.CrossAttention
    if block:
        kind, peer = ClassCrossAttentionBlock, crossvit.CrossAttentionBlock
    layer = kind(8, 2, qkv_bias=qkv_bias).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    peer = peer(8, 2, qkv_bias=qkv_bias).double()
    peer.load_state_dict(layer.state_dict())
    x = randn(3, 7, 8, dtype=torch.float64).requires_grad_()
    assert_same(layer, peer, [layer(x)], [peer(x)], [x])


@pytest.mark.parametrize("dims, heads, depth", [((6, 8), (3, 2), 1), ((4, 6, 8), (2, 3, 1), 2)])
def test_fusion_is_timms(dims, heads, depth):
    """timm's block has transformer blocks of each branch before the fusion: here, identities."""
    import_timm()
    from timm.models.crossvit import MultiScaleBlock

    torch.manual_seed(0)
    layer = CrossScaleFusion(dims, heads, depth, qkv_bias=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rest = {"patches": None, "mlp_ratio": [1.0] * len(dims), "qkv_bias": True, "drop_path": [0.0]}
    depths = [0] * len(dims) + [depth]
    peer = MultiScaleBlock(dim=dims, depth=depths, num_heads=heads, **rest).double()
    peer.load_state_dict(layer.state_dict())
    peer.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in dims)
    branches = [
        randn(2, 3 + i, dim, dtype=torch.float64, seed=i).requires_grad_()
        for i, dim in enumerate(dims)
    ]
    assert_same(layer, peer, layer(branches), peer(branches), branches)


def test_refuses():
    fusion = CrossScaleFusion((6, 8), (3, 2))
    for match, make in [
        ("dim must be", lambda: ClassCrossAttention(8, 3)),
        ("at least one token", lambda: ClassCrossAttention(8, 2)(randn(2, 0, 8))),
        ("x must be", lambda: ClassCrossAttentionBlock(8, 2)(randn(2, 3, 6))),
        ("two branches", lambda: CrossScaleFusion((6,), (3,))),
        ("depth must be", lambda: CrossScaleFusion((6, 8), (3, 2), 0)),
        ("branches must be 2", lambda: fusion([randn(2, 3, 6)])),
        (r"branches\[1\] must be", lambda: fusion([randn(2, 3, 6), randn(2, 3, 6)])),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
