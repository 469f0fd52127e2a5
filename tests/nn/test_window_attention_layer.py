"""Swin's window attention against timm's block and torchvision's function, with all gradients."""

import pytest
import torch
from peers import import_timm

from weft.nn import WindowAttention
from weft.ops.cases import randn

DIM, HEADS = 8, 2


def assert_same(ours, expected, inputs, other_inputs):
    torch.testing.assert_close(ours, expected)
    upstream = randn(*ours.shape, dtype=torch.float64, seed=3)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, other_inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def layer_of(window, shift, **options):
    torch.manual_seed(0)
    layer = WindowAttention(DIM, HEADS, window, shift, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.relative_position_bias_table)
    return layer


@pytest.mark.parametrize(
    "size, window, shift",
    [((8, 12), 4, 0), ((8, 12), 4, 2), ((6, 7), 4, 0), ((6, 8), (3, 4), (1, 2)), ((4, 8), 4, 2)],
)
def test_is_timms_block(size, window, shift):
    """With timm's state. Padded and shifted at once, timm rolls first: torchvision is the peer."""
    import_timm()
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(
        DIM, size, HEADS, window_size=window, shift_size=shift, always_partition=size != (4, 8)
    ).double()
    layer = layer_of(window, shift)
    block.attn.load_state_dict(layer.state_dict())
    x = randn(2, *size, DIM, dtype=torch.float64).requires_grad_()
    state = dict(block.attn.named_parameters())
    theirs = [x, *(state[name] for name, _ in layer.named_parameters())]
    assert_same(layer(x), block._attn(x), [x, *layer.parameters()], theirs)


@pytest.mark.parametrize("shift, qkv_bias", [(0, True), (1, False), ((0, 2), True), (2, False)])
@pytest.mark.parametrize("size", [(6, 9), (5, 12), (3, 7), (8, 8)])
def test_is_torchvisions_function(size, shift, qkv_bias):
    import_timm()  # torchvision comes with it
    functional = pytest.importorskip("torchvision.models.swin_transformer")
    window = (4, 3)
    layer = layer_of(window, shift, qkv_bias=qkv_bias)
    x = randn(2, *size, DIM, dtype=torch.float64).requires_grad_()
    bias = layer.relative_position_bias_table[functional_index(window)]
    expected = functional.shifted_window_attention(
        x,
        layer.qkv.weight,
        layer.proj.weight,
        bias.permute(2, 0, 1)[None],
        list(window),
        HEADS,
        list(layer.shift),
        qkv_bias=layer.qkv.bias,
        proj_bias=layer.proj.bias,
    )
    inputs = [x, *layer.parameters()]
    assert_same(layer(x), expected, inputs, inputs)


def functional_index(window):
    """The entry of Swin's table for each pair of places, by loops."""
    h, w = window
    places = [(y, x) for y in range(h) for x in range(w)]
    return torch.tensor(
        [[(y - v + h - 1) * (2 * w - 1) + x - u + w - 1 for v, u in places] for y, x in places]
    )


def test_a_shifted_window_does_not_join_the_ends():
    """Places from the two ends of the map meet in a window, and learn nothing of each other."""
    layer = layer_of(4, 2)
    x = randn(1, 8, 8, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[:, :2] += 1
    moved = (layer(x) - layer(changed)).abs().amax((0, 2, 3)) > 0
    assert moved.tolist() == [True] * 2 + [False] * 6


def test_compiles_for_maps_of_any_size():
    torch._dynamo.reset()
    layer = WindowAttention(DIM, HEADS, 4, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for size in ((6, 7), (9, 10)):
        x = randn(2, *size, DIM)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_refuses():
    for match, make in [
        ("dim must be", lambda: WindowAttention(8, 3)),
        ("window must be", lambda: WindowAttention(8, 2, 0)),
        ("shift must be below", lambda: WindowAttention(8, 2, 4, 4)),
        ("shift must be one or two", lambda: WindowAttention(8, 2, 4, -1)),
        ("x must be", lambda: WindowAttention(8, 2)(randn(2, 49, 8))),
        ("x must be", lambda: WindowAttention(8, 2)(randn(2, 7, 7, 6))),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(TypeError, match="x must be"):
        WindowAttention(8, 2)(torch.ones(2, 7, 7, 8, dtype=torch.int64))
