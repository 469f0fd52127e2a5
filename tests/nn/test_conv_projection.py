"""CvT's attention against transformers' module of the same weights, with all gradients."""

import pytest
import torch
from peers import import_transformers

from weft.nn import ConvProjectionAttention
from weft.ops.cases import randn

DIM, HEADS = 6, 2
NAMES = {
    f"conv_proj_{short}.{part}": f"attention.convolution_projection_{long}.convolution_projection."
    + ("convolution" if part == "conv" else "normalization")
    for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
    for part in ("conv", "bn")
} | {
    "proj_q": "attention.projection_query",
    "proj_k": "attention.projection_key",
    "proj_v": "attention.projection_value",
    "proj": "output.dense",
}


def translated(name):
    """The name in transformers of a parameter or buffer of ours."""
    module, _, leaf = name.rpartition(".")
    return f"{NAMES[module]}.{leaf}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "size, kernel, stride, query_stride, class_token, qkv_bias",
    [
        ((6, 8), 3, 2, 1, False, True),
        ((5, 7), 3, 2, 1, True, True),
        ((5, 4), 3, 1, 2, True, False),
        ((6, 5), 5, 3, 1, False, False),
    ],
)
def test_is_the_one_of_transformers(
    size, kernel, stride, query_stride, class_token, qkv_bias, training
):
    import_transformers()
    from transformers.models.cvt.modeling_cvt import CvtAttention

    torch.manual_seed(0)
    options = {"query_stride": query_stride, "class_token": class_token, "qkv_bias": qkv_bias}
    layer = ConvProjectionAttention(DIM, HEADS, kernel, stride, **options).double()
    for name, parameter in layer.named_parameters():
        if ".bn." in name:
            torch.nn.init.normal_(parameter)
    half = kernel // 2
    strides = (query_stride, stride)
    rest = ("dw_bn", qkv_bias, 0.0, 0.0, class_token)
    peer = CvtAttention(HEADS, DIM, kernel, half, half, *strides, *rest).double()
    peer.load_state_dict({translated(name): t for name, t in layer.state_dict().items()})
    layer.train(training), peer.train(training)
    N = size[0] * size[1] + class_token
    x = randn(3, N, DIM, dtype=torch.float64).requires_grad_()
    ours, expected = layer(x, *size), peer(x, *size)
    torch.testing.assert_close(ours, expected)
    theirs = dict(peer.named_parameters())
    theirs = [theirs[translated(name)] for name, _ in layer.named_parameters()]
    upstream = randn(*ours.shape, dtype=torch.float64, seed=3)
    for a, b in zip(
        torch.autograd.grad(ours, [x, *layer.parameters()], upstream),
        torch.autograd.grad(expected, [x, *theirs], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    for name, buffer in layer.named_buffers():  # running statistics
        torch.testing.assert_close(buffer, peer.state_dict()[translated(name)])


def test_refuses():
    layer = ConvProjectionAttention(8, 2)
    for match, make in [
        ("dim must be", lambda: ConvProjectionAttention(8, 3)),
        ("kernel must be odd", lambda: ConvProjectionAttention(8, 2, 4)),
        ("stride must be", lambda: ConvProjectionAttention(8, 2, 3, 0)),
        ("height must be", lambda: layer(randn(2, 12, 8), 0, 4)),
        ("x must be", lambda: layer(randn(2, 13, 8), 3, 4)),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
