"""The Triton kernels of the nearest rows: parts of columns, ties, float32 that cannot tell."""

import pytest
import torch

import weft
from weft.ops.cases import randn
from weft.ops.registration import INTERPRETED

common = pytest.importorskip("weft.triton_kernels.common")
kernels = pytest.importorskip("weft.triton_kernels.pairwise.nearest")

ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.usefixtures("interpreted"),
]


@pytest.fixture
def interpreted():
    """Small tiles."""
    with common.tiles_at_most(16):
        yield


def check(x, y, **options):
    """Indices and values are the reference's."""
    with weft.use("reference"):
        expected = weft.nearest(x, y, **options)
    with weft.use("triton"):
        found = weft.nearest(x, y, **options)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values, equal_nan=True)


@pytest.mark.parametrize("metric", ["sqeuclidean", "dot", "l1", "euclidean"])
@pytest.mark.parametrize("k", [1, 3, 32])
def test_parts_of_the_columns(k, metric):
    """Three rows, 300 columns in three parts of several tiles."""
    assert kernels.parts_of(3, 300, 16, 16) == 3
    check(randn(3, 20, device=DEVICE), randn(300, 20, device=DEVICE, seed=1), k=k, metric=metric)


@pytest.mark.parametrize("metric", ["sqeuclidean", "dot", "l1"])
@pytest.mark.parametrize("k", [1, 5])
def test_more_ties_than_candidates(k, metric):
    """40 copies of the nearest row, from the end of the table: the lowest indices win."""
    x, y = randn(3, 12, device=DEVICE), randn(100, 12, device=DEVICE, seed=1)
    best = y.double()[torch.cdist(x.double(), y.double()).argmin(1)[0]].float()
    y[60:] = 1.5 * x[0] if metric == "dot" else best
    check(x, y, k=k, metric=metric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [3, 20])
def test_far_from_the_origin(D, dtype):
    """Distances are 1e-3 of the lengths: the expanded square has no digit of them."""
    x = 100 + randn(5, D, dtype=torch.float64)
    y = 100 + randn(70, D, dtype=torch.float64, seed=1)
    check(x.to(DEVICE, dtype), y.to(DEVICE, dtype), k=4)


def test_differences_below_float32():
    """60 products that float32 cannot tell apart, in the order of float64."""
    x = torch.ones(2, 20, device=DEVICE)
    y = torch.ones(60, 20, device=DEVICE)
    y[:, 0] += 2.0**-23 * torch.arange(60, device=DEVICE)
    y[:, 1] = 1e6
    check(x, y, k=3, metric="dot")
    check(x, y, k=3, metric="dot", largest=False)


@pytest.mark.parametrize("largest", [False, True])
def test_nan_comes_first_and_masked_never(largest):
    x, y = randn(4, 20, device=DEVICE), randn(50, 20, device=DEVICE, seed=1)
    y[7, 3], y[9, 2], x[2, 0] = torch.nan, torch.inf, torch.nan
    mask = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE) > 0.5
    mask[3] = False
    mask[3, [7, 20]] = True
    check(x, y, k=3, largest=largest)
    check(x, y, k=3, largest=largest, mask=mask)
    mask[:, 7] = False
    check(x, y, k=3, largest=largest, mask=mask)
    check(x, y, k=3, largest=largest, mask=mask.T.contiguous().T)


@pytest.mark.parametrize("equal", [True, False])
def test_labels_and_the_diagonal(equal):
    """Rows of one matrix, of which many tie: candidates are not enough."""
    x = randn(40, 20, device=DEVICE)
    x[10:] = x[10]
    labels = torch.arange(40, device=DEVICE) % 3
    kind = weft.PairMask.same if equal else weft.PairMask.different
    check(x[:6], x, k=3, mask=kind(labels[:6], labels) & weft.PairMask.distinct())


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_leave_float32(scale):
    x, y = scale * randn(3, 20, device=DEVICE), scale * randn(40, 20, device=DEVICE, seed=1)
    with weft.use("reference"):
        expected = weft.nearest(x, y, k=2)
    with weft.use("triton"):
        assert torch.equal(weft.nearest(x, y, k=2).indices, expected.indices)


@pytest.mark.parametrize("metric", ["sqeuclidean", "dot", "l1"])
def test_gradient_of_a_row_chosen_often(metric):
    """One row of y is the nearest of 40: its segment takes several steps; others have none."""
    x, y = randn(40, 70, device=DEVICE), randn(6, 70, device=DEVICE, seed=1)
    y[4] = 50 * x.sum(0) if metric == "dot" else 0.01 * y[4]
    x, y, grad = x.requires_grad_(), y.requires_grad_(), randn(40, 1, device=DEVICE, seed=2)
    grads = []
    for name in ("reference", "triton"):
        with weft.use(name):
            values, indices = weft.nearest(x, y, metric=metric)
            grads.append(torch.autograd.grad(values, (x, y), grad))
    assert (indices == 4).sum() >= 20
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_refuses_in_words():
    x = randn(3, 8, device=DEVICE)
    with weft.use("triton"), pytest.raises(NotImplementedError, match="at most 32 neighbours"):
        weft.nearest(x, x, k=33)
