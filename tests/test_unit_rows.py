"""Rows of length 1, which cosines are made of: any length of the dtype, zeros, eps, gradients."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, running

import weft
from weft.ops.cases import randn
from weft.ops.pairwise.unit_rows import unit_rows

COMPILED = [i for i in IMPLEMENTATIONS if i != "reference"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [1, 3, 37])
def test_is_the_formula(implementation, dtype, D):
    """Also of lengths whose squares leave the dtype, of sliced rows and of more dimensions."""
    x = randn(2, 70, 2 * D, dtype=dtype)[..., ::2]
    largest = {torch.float64: 1e300, torch.float16: 1e4}.get(dtype, 1e37)
    scales = torch.tensor([1, largest, 1 / largest, 0, 1], dtype=dtype).repeat(14)
    x = (x * scales[:, None]).requires_grad_()
    grad = randn(2, 70, D, dtype=dtype, seed=1)
    with running(implementation):
        found = unit_rows(x)
        (of_x,) = torch.autograd.grad(found, x, grad)
    wide = x.detach().double()
    length = wide.norm(dim=-1, keepdim=True)
    if dtype == torch.float64:
        scale = scales.double()[:, None].clamp(min=1e-300)
        length = (wide / scale).norm(dim=-1, keepdim=True) * scale
    divisor = torch.where(length == 0, torch.inf, length)
    expected = wide / divisor
    upstream = grad.double()
    tangent = upstream - expected * (expected * upstream).sum(-1, keepdim=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=4 * eps, atol=1e-300)
    ordinary = (scales == 1) | (scales == 0)
    torch.testing.assert_close(
        of_x.double()[:, ordinary], (tangent / divisor)[:, ordinary], rtol=8 * eps, atol=30 * eps
    )
    assert found.is_contiguous() and of_x.shape == x.shape


@every_implementation
def test_eps_bounds_the_divisor(implementation):
    x = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]], requires_grad=True)
    with running(implementation):
        found = unit_rows(x, 0.1)
        (grad,) = torch.autograd.grad(found[:, 0].sum(), x)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    torch.testing.assert_close(grad[1:], torch.tensor([[10.0, 0.0], [10.0, 0.0]]))


@every_implementation
def test_gradients(implementation):
    x = randn(4, 5, dtype=torch.float64)
    x[1] = 0
    x[2, 3] = 0
    with running(implementation):
        moved = x[[0, 2, 3]].requires_grad_()
        assert torch.autograd.gradcheck(unit_rows, moved)
        assert torch.autograd.gradgradcheck(unit_rows, moved)
        of_zero = x.requires_grad_()
        first = torch.autograd.grad(unit_rows(of_zero).sin().sum(), of_zero, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), of_zero)[0]
    assert (first[1] == 0).all() and (second[1] == 0).all() and second.isfinite().all()


@pytest.mark.parametrize("implementation", COMPILED)
def test_edges_are_those_of_the_formula(implementation):
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [-0.0, 0.0], [1.0, -2.0]])
    for t in (x, x[:0], x[:, :0]):
        with weft.use("reference"):
            expected = unit_rows(t)
        with running(implementation):
            torch.testing.assert_close(unit_rows(t), expected, equal_nan=True)
