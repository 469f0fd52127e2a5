"""TNT's block against timm's of the same weights, with all gradients."""

import pytest
import torch
from peers import import_timm

from weft.nn import TNTBlock
from weft.ops.cases import randn

PIXEL_DIM, DIM, PIXELS, B, N = 4, 6, 5, 2, 4


@pytest.mark.parametrize("qkv_bias, mlp_ratio", [(True, 2.0), (False, 1.5)])
def test_is_timms(qkv_bias, mlp_ratio):
    import_timm()
    from timm.models.tnt import Block

    torch.manual_seed(0)
    options = {"qkv_bias": qkv_bias, "mlp_ratio": mlp_ratio}
    layer = TNTBlock(PIXEL_DIM, DIM, PIXELS, 2, 3, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    peer = Block(PIXEL_DIM, DIM, PIXELS, 2, 3, **options).double()
    peer.load_state_dict(layer.state_dict())
    pixels = randn(B * (N - 1), PIXELS, PIXEL_DIM, dtype=torch.float64).requires_grad_()
    patches = randn(B, N, DIM, dtype=torch.float64, seed=1).requires_grad_()
    ours, expected = layer(pixels, patches), peer(pixels, patches)
    state = dict(peer.named_parameters())
    theirs = [state[name] for name, _ in layer.named_parameters()]
    upstream = [randn(*t.shape, dtype=torch.float64, seed=3 + i) for i, t in enumerate(ours)]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(ours, [pixels, patches, *layer.parameters()], upstream),
        torch.autograd.grad(expected, [pixels, patches, *theirs], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_refuses():
    layer = TNTBlock(PIXEL_DIM, DIM, PIXELS, 2, 3)
    pixels, patches = randn(B * (N - 1), PIXELS, PIXEL_DIM), randn(B, N, DIM)
    for match, make in [
        ("pixel_dim must be", lambda: TNTBlock(5, DIM, pixel_heads=2)),
        ("dim must be", lambda: TNTBlock(PIXEL_DIM, 7, num_heads=3)),
        ("mlp_ratio must be", lambda: TNTBlock(PIXEL_DIM, DIM, mlp_ratio=0.0)),
        ("num_pixels must be", lambda: TNTBlock(PIXEL_DIM, DIM, 0)),
        ("patches must be", lambda: layer(pixels, patches[..., :5])),
        ("pixels must be", lambda: layer(pixels[:, :4], patches)),
        ("pixels must be of", lambda: layer(pixels[:5], patches)),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
