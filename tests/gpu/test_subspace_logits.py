"""Subspace logits on a GPU: more than 2^31 elements, memory, tf32 only where it is asked for."""

import pytest
import torch

import weft
from weft.ops.cases import randn
from weft.ops.pairwise.cases.inputs import orthonormal
from weft.ops.pairwise.cases.subspace_logits import plain_subspace_logits

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
kernels = pytest.importorskip("weft.triton_kernels.pairwise.subspace_logits")
PLANS = ["fused", "chunked"]
OPTIONS = (1.0, False, False, 0.0)


def needs_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB, {free >> 30} are free")


def spread(tensor: torch.Tensor, stride: int) -> torch.Tensor:
    """The tensor with this stride in its first dimension, in uninitialised memory."""
    reach = stride * (tensor.shape[0] - 1) + tensor.numel()
    out = tensor.new_empty(reach).as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
    return out.copy_(tensor)


@pytest.mark.parametrize("plan", PLANS)
def test_strides_beyond_32_bits(plan):
    needs_memory(30)
    x = randn(4, 64, dtype=torch.bfloat16, device=DEVICE)
    bases = orthonormal(4, 64, 8, torch.bfloat16, DEVICE)
    grad = randn(4, 4, dtype=torch.bfloat16, device=DEVICE)
    results = []
    for make in (lambda tensor: tensor, lambda tensor: spread(tensor, 2**30)):
        inputs = make(x), make(bases), None
        logits, z = kernels.subspace_logits(*inputs, *OPTIONS, True, plan)
        grads = kernels.subspace_logits_backward(make(grad), *inputs, z, *OPTIONS)
        results.append((logits, z, *grads))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("plan", PLANS)
def test_results_beyond_32_bits(plan):
    """B·C = 2^31 + 2^16: the last rows are those of a small call."""
    needs_memory(40)
    B, C = 2**16, 2**15 + 1
    x = randn(B, 16, dtype=torch.bfloat16, device=DEVICE)
    bases = orthonormal(C, 16, 1, torch.bfloat16, DEVICE)
    logits, z = kernels.subspace_logits(x, bases, None, *OPTIONS, True, plan)
    last, last_z = kernels.subspace_logits(x[-64:], bases, None, *OPTIONS, True, plan)
    torch.testing.assert_close(logits[-64:], last)
    torch.testing.assert_close(z[:, :, -64:], last_z)
    grad = torch.zeros_like(logits)
    grad[-64:] = 1
    grads = kernels.subspace_logits_backward(grad, x, bases, None, z, *OPTIONS)
    small = kernels.subspace_logits_backward(grad[-64:], x[-64:], bases, None, last_z, *OPTIONS)
    torch.testing.assert_close(grads[0][-64:], small[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(grads[1], small[1], rtol=2e-2, atol=2e-2)


def test_float32_is_not_tf32(monkeypatch):
    """tf32 has an error near 3e-4; it is used where PyTorch is told to."""
    x, bases = randn(256, 2048, device=DEVICE), orthonormal(100, 2048, 8, torch.float32, DEVICE)
    truth = plain_subspace_logits(x.double(), bases.double())
    error = (weft.subspace_logits(x, bases).double() - truth).norm() / truth.norm()
    assert error < 2e-6
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    error = (weft.subspace_logits(x, bases).double() - truth).norm() / truth.norm()
    assert 1e-5 < error < 1e-3


def test_memory_does_not_grow_with_the_projections():
    """Beyond its results and a float32 gradient of x, a step takes at most 256 MB."""
    needs_memory(20)
    B, D, k = 256, 1024, 8
    extra = []
    for C in (20_000, 80_000):
        x = randn(B, D, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
        bases = torch.randn(C, k, D, dtype=torch.bfloat16, device=DEVICE).mT.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = weft.subspace_logits(x, bases, gamma=25.0, normalize=True)
        grads = torch.autograd.grad(logits, (x, bases), torch.ones_like(logits))
        results = sum(t.numel() * t.itemsize for t in (logits, logits, *grads))
        extra.append(torch.cuda.max_memory_allocated() - before - results - 4 * x.numel())
        del x, bases, logits, grads
    assert max(extra) <= 256 << 20, extra
