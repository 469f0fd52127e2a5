"""Projection onto subspaces: the properties that make it one."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, name_and_device, running

import weft
from weft.ops.cases import randn
from weft.ops.pairwise.cases.inputs import orthonormal
from weft.ops.pairwise.subspace_project import forward

DECLARED = {known.name for known in forward.dispatcher.implementations}
every_implementation = pytest.mark.parametrize(
    "implementation", [i for i in IMPLEMENTATIONS if name_and_device(i)[0] in DECLARED]
)


@every_implementation
def test_coordinates(implementation):
    x, basis = torch.tensor([[1.0, 2.0, 3.0]]), torch.eye(3)[:, [0, 2]]
    with running(implementation):
        assert torch.equal(weft.subspace_project(x, basis), torch.tensor([[1.0, 0.0, 3.0]]))
        rest = weft.subspace_project(x, basis, complement=True)
    assert torch.equal(rest, torch.tensor([[0.0, 2.0, 0.0]]))


@every_implementation
def test_projector(implementation):
    """P P = P, P(1 − P) = 0, Pythagoras, and the length that the logits measure."""
    x = randn(20, 30, dtype=torch.float64)
    bases = orthonormal(4, 30, 5, torch.float64, "cpu")
    with running(implementation):
        inside = weft.subspace_project(x, bases)
        outside = weft.subspace_project(x, bases, complement=True)
        for c in range(4):
            again = weft.subspace_project(inside[:, c], bases[c])
            torch.testing.assert_close(again, inside[:, c])
            nothing = weft.subspace_project(outside[:, c], bases[c])
            torch.testing.assert_close(nothing, torch.zeros_like(nothing))
        logits = weft.subspace_logits(x, bases)
    torch.testing.assert_close(inside + outside, x[:, None].expand_as(inside))
    torch.testing.assert_close(inside.norm(dim=-1), logits)
    total = inside.square().sum(-1) + outside.square().sum(-1)
    torch.testing.assert_close(total, x.square().sum(-1, keepdim=True).expand_as(total))


@every_implementation
def test_one_of_several(implementation):
    x, bases = randn(6, 9), orthonormal(3, 9, 2, torch.float32, "cpu")
    with running(implementation):
        found = weft.subspace_project(x, bases, complement=True)
        for c in range(3):
            alone = weft.subspace_project(x, bases[c], complement=True)
            torch.testing.assert_close(found[:, c], alone)


def test_gradient_of_the_complement_is_tangent():
    """The complement does not move with the part of x inside: that gradient vanishes."""
    x = randn(7, 12, dtype=torch.float64).requires_grad_()
    basis = orthonormal(1, 12, 3, torch.float64, "cpu")[0]
    weft.subspace_project(x, basis, complement=True).square().sum().backward()
    torch.testing.assert_close(x.grad @ basis, torch.zeros(7, 3, dtype=torch.float64))
