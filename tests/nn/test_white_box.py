"""White-box transformer blocks against their formulas in float64."""

import pytest
import torch

from weft.nn import CRATEBlock, CRATEDecoderBlock, SubspaceAttention
from weft.ops.cases import randn

B, N, C, H, P = 2, 6, 8, 3, 4


def tokens():
    return randn(B, N, C, dtype=torch.float64).requires_grad_()


def mssa(layer, x):
    """One head of one sample at a time."""
    rows = []
    for sample in x:
        parts = []
        for basis in layer.qkv.weight.split(P):
            z = sample @ basis.mT
            parts.append(torch.softmax(z @ z.mT / P**0.5, 1) @ z)
        rows.append(layer.to_out[0](torch.cat(parts, 1)))
    return torch.stack(rows)


def encoder(block, x):
    x = block.norm2(x + mssa(block.attention, block.norm1(x)))
    D, eta, weight = block.dictionary, 0.2, 0.3
    rows = [torch.relu(z + eta * (D.mT @ (z - D @ z)) - eta * weight) for z in x.flatten(0, 1)]
    return torch.stack(rows).view(B, N, C)


def decoder(block, x):
    x = block.norm1(x) @ block.dictionary.mT
    return x - mssa(block.attention, block.norm2(x))


@pytest.mark.parametrize(
    "make, truth",
    [
        (lambda **kw: SubspaceAttention(C, H, P, **kw), mssa),
        (lambda **kw: CRATEBlock(C, H, P, step_size=0.2, sparsity=0.3, **kw), encoder),
        (lambda **kw: CRATEDecoderBlock(C, H, P, **kw), decoder),
    ],
)
def test_is_the_published_one(make, truth):
    torch.manual_seed(0)
    layer, x = make(dtype=torch.float64), tokens()
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    out, expected = layer(x), truth(layer, x)
    torch.testing.assert_close(out, expected)
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_coding_is_a_proximal_gradient_step():
    """From the code x, on half the squared distance of x and D a plus lambda times its sum."""
    torch.manual_seed(0)
    block = CRATEBlock(C, H, P, step_size=0.2, sparsity=0.3, dtype=torch.float64)
    x = tokens()
    start = block.norm2(x + block.attention(block.norm1(x))).detach()
    code = start.clone().requires_grad_()
    distance = (start - code @ block.dictionary.mT).square().sum() / 2
    (slope,) = torch.autograd.grad(distance, code)
    torch.testing.assert_close(block(x), (start - 0.2 * slope - 0.2 * 0.3).clamp(min=0))


@pytest.mark.parametrize(
    "match, make",
    [
        ("num_heads", lambda: SubspaceAttention(C, 0)),
        ("head_dim", lambda: SubspaceAttention(C, H, 0)),
        ("step_size", lambda: CRATEBlock(C, H, step_size=0.0)),
        ("sparsity", lambda: CRATEBlock(C, H, sparsity=-1.0)),
        ("x must", lambda: SubspaceAttention(C, H)(torch.ones(B, N, C + 1))),
        ("x must", lambda: CRATEDecoderBlock(C, H)(torch.ones(N, C))),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
