"""The Triton kernels of subspace logits: both plans, several tiles and groups, extreme values."""

import itertools

import pytest
import torch
from contract import assert_accurate, name_of, ulps

from weft.ops.cases import randn
from weft.ops.pairwise.cases.inputs import orthonormal
from weft.ops.pairwise.cases.subspace_logits import plain_subspace_logits
from weft.ops.registration import INTERPRETED
from weft.reference.pairwise import subspace_logits as reference

common = pytest.importorskip("weft.triton_kernels.common")
kernels = pytest.importorskip("weft.triton_kernels.pairwise.subspace_logits")

ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.usefixtures("interpreted"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLANS = ["fused", "chunked"]


@pytest.fixture
def interpreted():
    """Small tiles, whatever the plan."""
    with common.tiles_at_most(16):
        yield


def run(x, bases, dims=None, gamma=1.0, squared=False, normalize=False, eps=0.0, save=True,
        plan="fused", seed=3):  # fmt: skip
    """(logits, grad_x, grad_bases, upstream) of the launchers."""
    options = (gamma, squared, normalize, eps)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        logits, z = kernels.subspace_logits(x, bases, dims, *options, save, plan)
        grad = randn(*logits.shape, dtype=x.dtype, device=DEVICE, seed=seed)
        grads = kernels.subspace_logits_backward(grad, x, bases, dims, z, *options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.is_contiguous() and grads[0].is_contiguous()
    assert grads[1].stride(1 if bases.stride(1) == 1 else 2) == 1
    assert not save or z.shape == (bases.shape[0], bases.shape[2], x.shape[0])
    return logits, *grads, grad


def truth_of(x, bases, dims, grad, *options):
    exact = (x.double(), bases.double(), dims, *options)
    grads = reference.subspace_logits_backward(grad.double(), *exact)
    return reference.subspace_logits(*exact), *grads


def plain_of(x, bases, dims, grad, gamma, squared, normalize, eps):
    x, bases = (t.detach().clone().requires_grad_() for t in (x, bases))
    kinds = {"gamma": gamma, "squared": squared, "normalize": normalize, "eps": eps}
    logits = plain_subspace_logits(x, bases, dims=dims, **kinds)
    return logits.detach(), *torch.autograd.grad(logits, (x, bases), grad)


def check(x, bases, dims=None, gamma=1.0, squared=False, normalize=False, eps=0.0, **how):
    options = (gamma, squared, normalize, eps)
    *found, grad = run(x, bases, dims, *options, **how)
    expected = truth_of(x, bases, dims, grad, *options)
    plain = plain_of(x, bases, dims, grad, *options)
    for one, other, truth, factor in zip(found, plain, expected, (2, 3, 3), strict=True):
        assert_accurate(one, truth, ulps(other, truth, one.dtype), factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_several_tiles(plan, save, dtype):
    """17 samples, 5 classes of 4 padded to 16 columns, 33 features, by 16."""
    x, bases = randn(17, 33, dtype=dtype, device=DEVICE), orthonormal(5, 33, 4, dtype, DEVICE)
    check(x, bases, gamma=25.0, normalize=True, save=save, plan=plan)


def test_order_of_programs():
    """18 tiles of samples in groups of 16, two tiles of classes."""
    check(randn(273, 8, device=DEVICE), orthonormal(5, 8, 4, torch.float32, DEVICE))


@pytest.mark.parametrize("k", [1, 2, 3, 16, 17, 33])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_columns_of_a_class(plan, squared, k):
    """Fewer and more than a tile has; 33 takes three steps of the loop over k."""
    x, bases = randn(3, 40, device=DEVICE), orthonormal(2, 40, k, torch.float32, DEVICE)
    check(x, bases, squared=squared, plan=plan)


@pytest.mark.parametrize("layout", ["by_rows", "by_columns", "padded_rows", "permuted"])
@pytest.mark.parametrize("plan", PLANS)
def test_layouts_by_groups(plan, layout, monkeypatch):
    """Several groups of classes, bases with and without D as unit stride, W a view or not."""
    monkeypatch.setattr(kernels, "GROUP_BYTES", 1)
    bases = orthonormal(3, 20, 4, torch.float32, DEVICE)
    if layout == "by_columns":
        bases = bases.contiguous()
    if layout == "padded_rows":
        bases = orthonormal(6, 40, 4, torch.float32, DEVICE)[::2, :20]
    if layout == "permuted":
        bases = bases.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    x = randn(20, 5, device=DEVICE).T
    for save in (True, False):
        check(x, bases, gamma=2.0, normalize=True, save=save, plan=plan)


@pytest.mark.parametrize("normalize", [False, True])
def test_groups_are_summed_in_float32(normalize, monkeypatch):
    """64 groups differ from one by a rounding of the result, not by 64 roundings."""
    x, bases = randn(4, 16, dtype=torch.bfloat16, device=DEVICE), randn(64, 1, 16, device=DEVICE).mT
    once = run(x, bases.bfloat16(), normalize=normalize)[1]
    monkeypatch.setattr(kernels, "GROUP_BYTES", 1)
    by_groups = run(x, bases.bfloat16(), normalize=normalize)[1]
    assert (once.float() - by_groups.float()).abs().max() <= 2**-8 * once.float().abs().max()


def test_bfloat16_is_rounded_to_nearest():
    x = randn(8, 64, dtype=torch.bfloat16, device=DEVICE)
    truth = torch.nn.functional.normalize(x.double())
    found = kernels.unit(x, 0.0).double()
    assert ((found - truth).abs() <= 1.001 * 2**-8 * truth.abs()).all()


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_padding_is_not_read(plan, by_rows, groups, monkeypatch):
    if groups > 1:
        monkeypatch.setattr(kernels, "GROUP_BYTES", 1)
    dims = torch.tensor([4, 1, 0, 3, 2, 4], device=DEVICE)
    unused = torch.arange(4, device=DEVICE) >= dims[:, None]
    bases = orthonormal(6, 20, 4, torch.float32, DEVICE).masked_fill(unused[:, None, :], torch.nan)
    bases = bases.mT.contiguous().mT if by_rows else bases.contiguous()
    x = randn(18, 20, device=DEVICE)
    for save in (True, False):
        logits, grad_x, grad_bases, grad = run(x, bases, dims, save=save, plan=plan)
        clean = bases.nan_to_num(0.0)
        expected = truth_of(x, clean, dims, grad, 1.0, False, False, 0.0)
        for one, two in zip((logits, grad_x, grad_bases), expected, strict=True):
            torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)
        assert not grad_bases.mT[unused].any()


def test_gradient_of_padding_is_zero_beside_a_nan():
    bases, dims = orthonormal(2, 8, 4, torch.float32, DEVICE), torch.tensor([1, 4], device=DEVICE)
    _, _, grad_bases, _ = run(torch.full((3, 8), torch.nan, device=DEVICE), bases, dims)
    assert not grad_bases[0, :, 1:].any() and grad_bases[0, :, 0].isnan().all()


@pytest.mark.parametrize("dims", [[-3, 9], [0, 0]])
@pytest.mark.parametrize("plan", PLANS)
def test_dims_out_of_range_are_clamped(plan, dims):
    """Nobody checks them on a GPU; no access is out of bounds."""
    x, bases = randn(3, 8, device=DEVICE), orthonormal(2, 8, 4, torch.float32, DEVICE)
    *found, grad = run(x, bases, torch.tensor(dims, device=DEVICE), plan=plan)
    clamped = torch.tensor(dims, device=DEVICE).clamp(0, 4)
    expected = truth_of(x, bases, clamped, grad, 1.0, False, False, 0.0)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_no_underflow_or_overflow(plan, normalize, scale):
    """Squares of these lengths are 0 or infinite in float32; one ordinary sample among them."""
    x, bases = scale * randn(4, 20, device=DEVICE), orthonormal(3, 20, 4, torch.float32, DEVICE)
    x[1] /= scale
    *found, grad = run(x, bases, normalize=normalize, plan=plan)
    expected = truth_of(x, bases, None, grad, 1.0, False, normalize, 0.0)
    for b in range(4):
        for one, two in zip(found[:2], expected[:2], strict=True):
            error = (one[b].double() - two[b]).abs().max()
            assert error <= 1e-5 * two[b].abs().max()


@pytest.mark.parametrize("eps", [0.0, 1.5, 100.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_zero_and_nan(plan, normalize, eps):
    """A zero sample has logits and gradients 0, a NaN stays in its row; eps may exceed lengths."""
    x, bases = randn(4, 20, device=DEVICE), orthonormal(3, 20, 4, torch.float32, DEVICE)
    x[1], x[2, 3] = 0, torch.nan
    logits, grad_x, grad_bases, grad = run(x, bases, normalize=normalize, eps=eps, plan=plan)
    expected = truth_of(x, bases, None, grad, 1.0, False, normalize, eps)
    assert (
        not logits[1].any()
        and logits[2].isnan().all()
        and grad_x[2].isnan().all()
        and grad_bases.isnan().all()
    )
    for one, two in zip((logits, grad_x), expected, strict=False):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_plans_are_chosen_by_shape_and_dtype():
    """float32 has no matrix units without tf32; k = 5 would be padded to 8; wide and many."""
    plans = {}
    for dtype, D, C, k in itertools.product(DTYPES, (512, 2048), (1000, 100_000), (1, 3, 5, 8)):
        x = torch.empty(256, D, dtype=dtype, device="meta")
        plans[dtype, D, C, k] = kernels.plan_of(x, x.new_empty(C, D, k))
    assert {plan for (dtype, *_), plan in plans.items() if dtype == torch.float32} == {"chunked"}
    assert plans[torch.bfloat16, 2048, 1000, 8] == plans[torch.bfloat16, 512, 100_000, 8] == "fused"
    assert plans[torch.float16, 2048, 100_000, 8] == plans[torch.float16, 512, 1000, 5] == "chunked"
    assert plans[torch.float16, 512, 1000, 3] == "fused"
