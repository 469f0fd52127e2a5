"""Nearest rows against a search in float64, and at the edges that the specification names."""

from pathlib import Path

import pytest
import torch
from conftest import IMPLEMENTATIONS, running

import weft
from weft.benchmarks import memory
from weft.ops.cases import randn

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def brute_force(x, y, k, metric="sqeuclidean", mask=None, largest=False):
    """Indices by a stable sort of all pairs in float64, from differences; 0 columns give −1."""
    x, y = x.double(), y.double()
    if metric == "dot":
        s = x @ y.T
    elif metric == "l1":
        s = torch.cdist(x, y, p=1.0)
    else:
        s = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    s = -s if largest else s
    if mask is not None:
        s = s.masked_fill(~mask, torch.inf)
    s, order = s.sort(dim=1, stable=True)
    return torch.where(s.isinf(), -1, order)[:, :k]


def clustered(N, M, D, offset=0.0, dtype=torch.float32, seed=0):
    """Points around few centres: many nearly equal distances."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(20, D, generator=generator)
    rows = [
        centres[torch.randint(20, (n,), generator=generator)]
        + 0.1 * torch.randn(n, D, generator=generator)
        + offset
        for n in (N, M)
    ]
    return [r.to(dtype) for r in rows]


def test_a_line():
    x, y = torch.tensor([[0.9], [5.1]]), torch.tensor([[0.0], [1.0], [2.0], [5.0]])
    values, indices = weft.nearest(x, y, 2, metric="euclidean")
    assert indices.tolist() == [[1, 0], [3, 2]]
    torch.testing.assert_close(values, torch.tensor([[0.1, 0.9], [0.1, 3.1]]))
    values, indices = weft.nearest(x, y, 1, metric="dot")  # of a similarity the largest
    assert indices.tolist() == [[3], [3]]


@dtypes
@every_implementation
@pytest.mark.parametrize("k, D", [(1, 5), (1, 130), (10, 64), (10, 131)])
def test_recall_is_one(implementation, dtype, k, D):
    """On clusters, and far from the origin, where products alone lose every digit."""
    for offset in (0.0, 1000.0):
        x, y = clustered(61, 2003, D, offset, dtype)
        with running(implementation):
            assert torch.equal(weft.nearest(x, y, k).indices, brute_force(x, y, k))


@every_implementation
def test_values_have_no_cancellation(implementation):
    """Points 1e-3 apart at offset 1000: the expanded square would be off by more than that."""
    x = 1000 + randn(7, 32)
    y = x + 1e-3 * randn(7, 32, seed=1)
    with running(implementation):
        values, indices = weft.nearest(x, y)
    assert torch.equal(indices[:, 0], torch.arange(7))
    expected = (x.double() - y.double()).square().sum(1)
    torch.testing.assert_close(values[:, 0].double(), expected, rtol=1e-5, atol=0)


@every_implementation
@pytest.mark.parametrize("k", [1, 4, 40])
def test_ties_go_to_the_lowest_index(implementation, k):
    """Repeated points, and a grid on which most distances are equal."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 3, (n, 3), generator=generator).float() for n in (23, 700))
    with running(implementation):
        for metric in ("sqeuclidean", "dot", "l1"):
            largest = metric == "dot"
            found = weft.nearest(x, y, k, metric=metric)
            assert torch.equal(found.indices, brute_force(x, y, k, metric, largest=largest))
        same = weft.nearest(x, torch.ones(600, 3), k)
        assert (same.indices == torch.arange(k)).all()


@every_implementation
def test_masked_and_missing_columns(implementation):
    x, y = randn(5, 6), randn(300, 6, seed=1)
    mask = randn(5, 300, seed=2) > 1
    mask[1] = False
    mask[2] = torch.arange(300) == 7
    y.requires_grad_()
    with running(implementation):
        values, indices = weft.nearest(x, y, 4, mask=mask)
        assert torch.equal(indices, brute_force(x, y.detach(), 4, mask=mask))
        assert values[1].isposinf().all() and values[2, 1:].isposinf().all()
        values.backward(torch.ones_like(values))
        assert y.grad.isfinite().all() and (y.grad[~mask.any(0)] == 0).all()
        largest = weft.nearest(x, y[:2], 3, largest=True)
    assert (largest.indices[:, 2] == -1).all() and largest.values[:, 2].isneginf().all()


@every_implementation
def test_masked_rows_are_never_read(implementation):
    """A NaN or an infinity behind the mask is in no result and no gradient."""
    x, y = randn(4, 6).requires_grad_(), randn(9, 6, seed=1)
    y[3], y[5] = torch.nan, torch.inf
    y.requires_grad_()
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[:, [3, 5]] = False
    with running(implementation):
        values, indices = weft.nearest(x, y, 7, mask=mask)
        values.sum().backward()
    assert values.isfinite().all() and not ((indices == 3) | (indices == 5)).any()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


@every_implementation
def test_nan_comes_first(implementation):
    x, y = randn(3, 4), randn(700, 4, seed=1)
    x[1], y[[5, 600]] = torch.nan, torch.nan
    with running(implementation):
        values, indices = weft.nearest(x, y, 3)
    assert indices[0, :2].tolist() == [5, 600] and values[0, :2].isnan().all()
    assert values[0, 2].isfinite()
    assert indices[1].tolist() == [0, 1, 2] and values[1].isnan().all()


@every_implementation
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_outside_float32(implementation, scale):
    """Products overflow or vanish; the order does not depend on them."""
    x, y = scale * randn(5, 6), scale * randn(200, 6, seed=1)
    with running(implementation):
        assert torch.equal(weft.nearest(x, y, 3).indices, brute_force(x, y, 3))


@every_implementation
def test_pair_masks(implementation):
    x = randn(30, 4)
    labels = torch.arange(30) % 3
    mask = weft.PairMask.same(labels, labels) & weft.PairMask.distinct()
    dense = (labels[:, None] == labels) & ~torch.eye(30, dtype=torch.bool)
    if implementation.startswith("triton"):
        mask = dense
    with running(implementation):
        found = weft.nearest(x, x, 2, mask=mask)
        expected = weft.nearest(x, x, 2, mask=dense)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.indices, brute_force(x, x, 2, mask=dense))


@pytest.mark.parametrize("metric", ["cosine", "rbf", "log", "poincare", "lorentz", "mahalanobis"])
def test_metrics_agree_with_all_pairs(metric):
    options = {"precision": 2 * torch.eye(4)} if metric == "mahalanobis" else {}
    x, y = 0.2 * randn(6, 4), 0.2 * randn(50, 4, seed=1)
    if metric == "lorentz":
        x, y = (torch.cat([(1 + t.square().sum(1, keepdim=True)).sqrt(), t], 1) for t in (x, y))
        options = {}
    found = weft.nearest(x, y, 5, metric=metric, **options)
    with weft.use("reference"):
        expected = weft.nearest(x, y, 5, metric=metric, **options)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-5)


def test_gradients_of_factors_and_bias():
    x, y, bias = randn(5, 4), randn(9, 4, seed=1), randn(9, seed=2)
    leaves = [t.double().requires_grad_() for t in (x, y, bias)]

    def biased(x, y, bias):
        return weft.nearest(x, y, 3, metric="dot", bias=bias).values

    def poincare(x, y):
        return weft.nearest(0.2 * x.tanh(), 0.2 * y.tanh(), 3, metric="poincare").values

    assert torch.autograd.gradcheck(biased, leaves) and torch.autograd.gradgradcheck(biased, leaves)
    assert torch.autograd.gradcheck(poincare, leaves[:2])
    assert torch.autograd.gradgradcheck(poincare, leaves[:2])


@pytest.mark.parametrize("k", [1, 10])
def test_memory_does_not_grow_with_the_pairs(k):
    """Beyond its results a search takes buffers of a fixed size."""
    for N in (2_000, 8_000):
        x, y = randn(N, 16), randn(20_000, 16, seed=1)
        weft.nearest(x[:200], y, k)
        before = memory._resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        weft.nearest(x, y, k)
        assert memory._resident("VmHWM") - before < 64 << 20 < N * 20_000 * 4
