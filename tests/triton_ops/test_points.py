"""The Triton kernels between points: several tiles and parts, weights of 0, lengths."""

import pytest
import torch
from contract import ulps

from weft.ops.cases import randn
from weft.ops.registration import INTERPRETED
from weft.ops.transport import points as ops
from weft.reference.transport import sinkhorn_points as reference

common = pytest.importorskip("weft.triton_kernels.common")
kernels = pytest.importorskip("weft.triton_kernels.transport.points")
softmin = pytest.importorskip("weft.triton_kernels.transport.points_softmin")
product = pytest.importorskip("weft.triton_kernels.transport.points_product")

ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.usefixtures("interpreted"),
]


@pytest.fixture
def interpreted(monkeypatch):
    """Small tiles, a part for each, and memory full of NaN."""
    monkeypatch.setattr(kernels, "LEAST_TILES", 1)
    torch.use_deterministic_algorithms(True)
    with common.tiles_at_most(16):
        yield
    torch.use_deterministic_algorithms(False)


def problem(cost: str, D: int, ragged: bool, M=21) -> tuple:
    """The arguments that the ops share, then f, g and weights of the columns."""
    B, N = 2, 19
    x, y = randn(B, N, D, device=DEVICE), randn(B, M, D, device=DEVICE, seed=1)
    y[0, 5], y[1, 0] = x[0, 2], x[1, 1] + 1e-3
    rows = columns = None
    if ragged:
        rows, columns = (torch.tensor(n, device=DEVICE) for n in ([N, 3], [7, M]))
        x[1, 3:], y[0, 7:] = torch.nan, torch.nan
    f, g = 0.3 * randn(B, N, device=DEVICE, seed=2), 0.3 * randn(B, M, device=DEVICE, seed=3)
    w = randn(B, M, device=DEVICE, seed=4).abs()
    f[0, 3], g[1, 2], w[0, 1::3] = -torch.inf, -torch.inf, 0
    eps = torch.tensor([0.7, 1.4], device=DEVICE) * D**0.5
    return (x, y, eps, rows, columns, cost, "fp32"), f, g, w


def clean(*args, dtype: torch.dtype) -> tuple:
    """In this dtype, without the garbage beyond the lengths: the plain formula would spread it."""
    return tuple(
        torch.where(t.isnan(), 0, t).to(dtype)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for t in args
    )


def check(found: tuple, formula, *args) -> None:
    """Against float64: the largest error is at most three times that of the formula in float32, or
    2 ulp, as of every op."""
    exact, plain = (formula(*clean(*args, dtype=d)) for d in (torch.float64, torch.float32))
    bound = max(2, *(3 * ulps(one, two) for one, two in zip(plain, exact, strict=True)))
    for one, two in zip(found, exact, strict=True):
        assert one.is_contiguous() and one.shape == two.shape
        assert ulps(one, two) <= bound, (ulps(one, two), bound)


KINDS = [
    ("sqeuclidean", 3, True, 20),
    ("sqeuclidean", 20, False, 2),
    ("euclidean", 3, False, 1),
    ("euclidean", 20, True, 20),
    ("cosine", 20, False, 3),
    ("dot", 3, True, 1),
]


@pytest.mark.parametrize("cost, D, ragged, E", KINDS)
def test_soft_minima(cost, D, ragged, E):
    args, _, g, w = problem(cost, D, ragged)
    formula = lambda *t: (ops._reference_softmin(*t),)  # noqa: E731
    check((softmin.points_softmin(*args, g, w),), formula, *args, g, w)
    w[0] = 0  # nothing is summed
    assert (softmin.points_softmin(*args, g, w)[0] == torch.inf).all()


@pytest.mark.parametrize("cost, D, ragged, E", KINDS)
def test_products(cost, D, ragged, E):
    args, f, g, _ = problem(cost, D, ragged)
    left, right = (randn(*t.shape, E, device=DEVICE, seed=5) for t in (f, g))
    found = product.points_product_backward(*args, f, g, right, left)
    check(found, ops._formula_product_backward, *args, f, g, right, left)
    moved = product.points_product(*args, f, g, right)
    check((moved,), lambda *t: (ops._reference_product(*t),), *args, f, g, right)


@pytest.mark.parametrize("cost, D", [("euclidean", 3), ("sqeuclidean", 20), ("cosine", 20)])
def test_costs(cost, D):
    (x, y, *_), *_ = problem(cost, D, False)
    formula = lambda x, y: (reference.cost_matrix(x, y, cost),)  # noqa: E731
    check((kernels.points_cost(x, y, cost),), formula, x, y)


def test_parts_are_many_enough_and_no_more():
    """Of few rows; of many, one part."""
    assert kernels.parts_of(4, 10_000, 64) == (79, 128)
    assert kernels.parts_of(2000, 10_000, 64) == (1, 10_048)
    assert kernels.parts_of(1, 0, 64)[0] == 1
