"""Subspace logits against closed forms, and at the edges that the specification names."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, running
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import weft
from weft.ops.cases import randn
from weft.ops.pairwise import subspace_logits as module
from weft.ops.pairwise.cases.inputs import orthonormal

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
HEAD = {"normalize": True, "gamma": 25.0}


def coordinate_bases(*axes, D):
    """Class c spans the coordinate axes axes[c]."""
    return torch.stack([torch.eye(D)[:, list(a)] for a in axes])


@every_implementation
def test_coordinate_subspaces(implementation):
    """Projection onto coordinate axes keeps those coordinates."""
    x = torch.tensor([[3.0, 4.0, 12.0], [0.0, -2.0, 0.0]])
    bases = coordinate_bases((0, 1), (1, 2), (0, 2), D=3)
    with running(implementation):
        found = weft.subspace_logits(x, bases)
        head = weft.subspace_logits(x, bases, normalize=True, gamma=13.0, squared=True)
    expected = torch.tensor([[5, 160**0.5, 153**0.5], [2.0, 2.0, 0.0]])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head, 13 * (expected / torch.tensor([[13.0], [2.0]])) ** 2)


@every_implementation
def test_depends_on_the_subspace_alone(implementation):
    """Any other orthonormal basis of the subspaces gives the same logits."""
    x, bases = randn(9, 20), orthonormal(4, 20, 3, torch.float32, "cpu")
    turn = torch.linalg.qr(randn(4, 3, 3, seed=5)).Q
    with running(implementation):
        one, two = (weft.subspace_logits(x, s, **HEAD) for s in (bases, bases @ turn))
    torch.testing.assert_close(one, two)


@every_implementation
def test_gradient_is_the_projected_direction(implementation):
    """∂‖Sᵀx‖/∂x = S Sᵀx / ‖Sᵀx‖ and ∂/∂S = x (Sᵀx)ᵀ / ‖Sᵀx‖."""
    x, bases = randn(1, 6).requires_grad_(), orthonormal(1, 6, 2, torch.float32, "cpu")
    bases.requires_grad_()
    with running(implementation):
        out = weft.subspace_logits(x, bases)
        grad_x, grad_bases = torch.autograd.grad(out.sum(), (x, bases))
    with torch.no_grad():
        z = bases[0].T @ x[0]
        torch.testing.assert_close(grad_x[0], bases[0] @ z / z.norm())
        torch.testing.assert_close(grad_bases[0], torch.outer(x[0], z) / z.norm())


@every_implementation
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_no_underflow_or_overflow(implementation, size):
    """Squares of such features leave float32; logits and gradients do not."""
    x, bases = randn(5, 8), orthonormal(3, 8, 2, torch.float32, "cpu")
    with running(implementation):
        for options in ({}, HEAD):
            results = []
            for scale in (1.0, size):
                leaf = (x * scale).requires_grad_()
                out = weft.subspace_logits(leaf, bases, **options)
                results.append((out, torch.autograd.grad(out.sum(), leaf)[0]))
            (one, grad_one), (two, grad_two) = results
            head = "normalize" in options
            torch.testing.assert_close(two / (1 if head else size), one, rtol=1e-5, atol=0)
            torch.testing.assert_close(
                grad_two * (size if head else 1), grad_one, rtol=1e-4, atol=1e-5
            )


@every_implementation
def test_tiny_component(implementation):
    """A projection 1e-25 times its feature still has a length and a unit gradient."""
    x = torch.tensor([[1.0, 1e-25]], requires_grad=True)
    with running(implementation):
        out = weft.subspace_logits(x, coordinate_bases((1,), D=2))
        (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, torch.tensor([[1e-25]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 1.0]]))


@every_implementation
def test_zero_projection_and_zero_feature(implementation):
    """First and second derivatives are 0 where plain PyTorch has 0 and NaN."""
    x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    bases = coordinate_bases((0, 1), D=3).requires_grad_()
    for options in ({}, HEAD):
        with running(implementation):
            out = weft.subspace_logits(x, bases, **options)
            grads = torch.autograd.grad(out.sum(), (x, bases), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), (x, bases))
        for value in (out, *grads, *second):
            assert torch.equal(value, torch.zeros_like(value))


@every_implementation
def test_nan_spreads_to_its_own_row_alone(implementation):
    x, bases = randn(4, 6), orthonormal(3, 6, 2, torch.float32, "cpu")
    x[1, 2] = torch.nan
    for options in ({}, HEAD):
        with running(implementation):
            out = weft.subspace_logits(x, bases, **options)
        assert out[1].isnan().all() and not out[[0, 2, 3]].isnan().any()


@every_implementation
def test_ragged_equals_separate_classes(implementation):
    x, bases = randn(7, 9), orthonormal(4, 9, 3, torch.float32, "cpu")
    dims = torch.tensor([2, 0, 3, 1])
    with running(implementation):
        found = weft.subspace_logits(x, bases, dims=dims, **HEAD)
        for c, k in enumerate(dims.tolist()):
            alone = weft.subspace_logits(x, bases[c : c + 1, :, :k], **HEAD)
            torch.testing.assert_close(found[:, c], alone[:, 0])


@every_implementation
def test_gradient_layout(implementation):
    """The gradient of a layer's transposed view is again a view of (C, k, D)."""
    x, bases = randn(4, 6), orthonormal(3, 6, 2, torch.float32, "cpu")
    for layout in (bases, bases.contiguous()):
        leaf = layout.detach().requires_grad_()
        with running(implementation):
            (grad,) = torch.autograd.grad(weft.subspace_logits(x, leaf).sum(), leaf)
        assert grad.stride() == leaf.stride()


@every_implementation
def test_recomputed_projections(implementation, monkeypatch):
    """Above the limit of what is kept the backward computes the projections again: same bits."""
    grads = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(module, "SAVED_BYTES", limit)
        x = randn(300, 40).requires_grad_()
        bases = orthonormal(70, 40, 5, torch.float32, "cpu").requires_grad_()
        with running(implementation):
            out = weft.subspace_logits(x, bases, **HEAD)
            grads.append(torch.autograd.grad(out.square().sum(), (x, bases)))
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


def test_forward_and_backward_of_different_implementations():
    """What one implementation saves, another can use."""
    x, bases = randn(5, 7).requires_grad_(), orthonormal(3, 7, 2, torch.float32, "cpu")
    grads = []
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            out, saved = module.forward(x.detach(), bases, None, 25.0, False, True, 0.0, True)
        grad = module.backward(
            torch.ones_like(out), x.detach(), bases, None, saved, 25.0, False, True, 0.0
        )
        grads.append(grad)
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast the head computes in the dtype asked for, and the gradient is float32."""
    x, bases = randn(4, 6).requires_grad_(), orthonormal(3, 6, 2, torch.float32, "cpu")
    bases.requires_grad_()
    with torch.autocast("cpu", dtype):
        out = weft.subspace_logits(x, bases, **HEAD)
        assert out.dtype == dtype
        loss = F.cross_entropy(out, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert x.grad.dtype == bases.grad.dtype == torch.float32


def test_check_accepts_orthonormal_bases():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, bases = randn(4, 64, dtype=dtype), orthonormal(3, 64, 8, dtype, "cpu")
        weft.subspace_logits(x, bases, check=True)
    bases[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="orthonormal"):
        weft.subspace_logits(x, bases, check=True)


@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i.startswith("cpu")])
def test_any_shape_and_layout(implementation):
    """Sizes, strides, ragged dimensions and options that nobody chose, against the reference."""

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        sizes=st.tuples(st.integers(0, 70), st.integers(0, 40), st.integers(1, 90)),
        k=st.integers(0, 9),
        layout=st.sampled_from(["layer", "contiguous", "sliced"]),
        ragged=st.booleans(),
        squared=st.booleans(),
        normalize=st.booleans(),
        seed=st.integers(0, 99),
    )
    def check(sizes, k, layout, ragged, squared, normalize, seed):
        B, C, D = sizes
        k, dtype = min(k, D), torch.float64
        x = randn(B, D, dtype=dtype, seed=seed).requires_grad_()
        bases = randn(C, k, D, dtype=dtype, seed=seed + 1).mT
        if layout == "contiguous":
            bases = bases.contiguous()
        elif layout == "sliced":
            bases = torch.stack([bases, bases], dim=-1).flatten(-2)[..., ::2]
        bases = bases.detach().requires_grad_()
        dims = torch.arange(C) % (k + 1) if ragged else None
        results = []
        for name in (implementation, "reference"):
            with running(name):
                options = dict(dims=dims, gamma=3.0, squared=squared, normalize=normalize)
                out = weft.subspace_logits(x, bases, **options)
                results.append((out, *torch.autograd.grad(out.sin().sum(), (x, bases))))
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)

    check()
