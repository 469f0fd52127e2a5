"""The Triton kernels of transport: several tiles, weights of 0, masks, lengths, dustbins."""

import pytest
import torch

from weft.ops.cases import randn
from weft.ops.registration import INTERPRETED
from weft.ops.transport import plan as ops
from weft.ops.transport import sinkhorn as sinkhorn_ops
from weft.reference.transport import dense
from weft.reference.transport.dense import Problem
from weft.reference.transport.sinkhorn import Settings

common = pytest.importorskip("weft.triton_kernels.common")
plan = pytest.importorskip("weft.triton_kernels.transport.plan")
blocks = pytest.importorskip("weft.triton_kernels.transport.blocks")
implicit = pytest.importorskip("weft.triton_kernels.transport.implicit")
unrolled = pytest.importorskip("weft.triton_kernels.transport.unrolled")
kernels = pytest.importorskip("weft.triton_kernels.transport.sinkhorn")

ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.usefixtures("interpreted"),
]


@pytest.fixture
def interpreted():
    """Small tiles, and memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    with common.tiles_at_most(16):
        yield
    torch.use_deterministic_algorithms(False)


def problem(kind: str, B=2, N=19, M=35) -> tuple:
    """The first arguments of every op."""
    cost = randn(B, N, M, device=DEVICE)
    more_rows, more_columns = int(kind in ("dustbin", "row")), int(kind in ("dustbin", "column"))
    a = randn(B, N + more_rows, device=DEVICE, seed=1).exp()
    b = randn(B, M + more_columns, device=DEVICE, seed=2).exp()
    a[0, 2], b[1, -3] = 0, 0
    mask = rows = columns = border = None
    if kind == "masked":
        mask = randn(N, M, device=DEVICE, seed=3) < 1
        mask[:, 4], mask[3] = False, False
        mask = mask.expand(B, N, M)
    if kind in ("masked", "dustbin"):
        rows, columns = (torch.tensor(n, device=DEVICE) for n in ([N, 3], [7, M]))
    if more_rows or more_columns:
        border = randn(B, 3, device=DEVICE, seed=4)
    if kind == "column":
        cost = cost.mT.contiguous().mT
    balance = a.sum(1, keepdim=True) / b.sum(1, keepdim=True)
    eps = torch.tensor([0.7, 1.4], device=DEVICE)
    return cost, a, b * balance, eps, mask, rows, columns, border, kind == "masked"


def wide(args) -> tuple:
    """In float64."""
    return tuple(
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args
    )


def solved(args, iterations=20) -> tuple:
    settings = Settings(torch.inf, torch.inf, iterations, -1.0, False)
    return dense.sinkhorn(Problem(*args), None, settings)[:2]


def close(found, expected, tolerance=2e-5):
    for one, two in zip(found, expected, strict=True):
        assert one.is_contiguous() and one.shape == two.shape
        torch.testing.assert_close(one.to(two.dtype), two, rtol=tolerance, atol=tolerance)


KINDS = ["plain", "masked", "dustbin", "column", "row"]


@pytest.mark.parametrize("kind", KINDS)
def test_plan_and_value(kind):
    args = problem(kind)
    rest = solved(args)
    for log in (False, True):
        close(
            [plan.transport_plan(*args, *rest, log)],
            [ops._reference_plan(*wide(args), *wide(rest), log)],
        )
        grad = randn(*plan.transport_plan(*args, *rest, log).shape, device=DEVICE, seed=6)
        grad = grad.mT.contiguous().mT
        found = plan.transport_plan_backward(*args, *rest, grad, log)
        close(found, ops._formula_plan_backward(*wide(args), *wide(rest), grad.double(), log))
    grad = randn(2, device=DEVICE, seed=7)
    for rho in ((torch.inf, torch.inf), (4.0, torch.inf), (6.0, 5.0)):
        found = plan.transport_value(*args, *rest, *rho)
        close([found], [dense.value(Problem(*wide(args)), *wide(rest), *rho)])
        found = plan.transport_value_backward(*args, *rest, grad, *rho)
        close(found, ops._formula_value_backward(*wide(args), *wide(rest), grad.double(), *rho))


ROUTES = ["problem", "blocks", "long"]
FREE = torch.inf, torch.inf


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Whole problems in a program; blocks of rows, several of them; rows by tiles."""
    if request.param != "problem":
        monkeypatch.setattr(kernels, "ENTRIES", -1)
    if request.param == "blocks":
        monkeypatch.setattr(blocks, "BLOCKS", 1 + (DEVICE == "cpu"))
    if request.param == "long":
        monkeypatch.setattr(blocks, "LONGEST", 0)
        monkeypatch.setattr(kernels, "LONGEST", 0)


def check_solution(args, start, rho, iterations, tolerance, relax, bound=2e-5):
    """Also that all problems stop after as many iterations."""
    found = kernels.sinkhorn(*args, start, *rho, iterations, tolerance, relax, False)
    settings = Settings(*rho, iterations, tolerance, relax, args[7] is not None)
    first = start if start is None else start.double()
    expected = dense.sinkhorn(Problem(*wide(args)), first, settings)
    assert torch.equal(found[3], expected[3])
    close(found[:2], expected[:2], bound)
    close(found[2:3], expected[2:3], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sinkhorn(kind, route):
    check_solution(problem(kind), None, FREE, 6, -1.0, False)


@pytest.mark.parametrize("rho", [(0.5, 2.0), (torch.inf, 0.7), (0.7, torch.inf)])
def test_penalties(rho, route):
    args = problem("masked")
    start = 0.1 * args[2].log()  # with an infinity
    check_solution(args, start, rho, 5, -1.0, False)


def test_relaxation_and_stops(route):
    """One problem stops before the other; the factor is chosen once. No error of these iterations
    is within a tenth of the tolerance, so rounding does not decide where they stop."""
    cost, *others = problem("plain", N=7, M=12)
    others[2] = torch.tensor([0.15, 2.0], device=DEVICE)
    check_solution((cost, *others), None, FREE, 45, 3.4e-4, True, 2e-4)


def test_columns_that_underflow(route):
    """Costs that leave nothing of a column's sum in float32."""
    cost, *others = problem("plain", N=20, M=18)
    cost[:, :, 3] += 200
    cost[:, 5] += 300
    check_solution((cost, *others), None, FREE, 4, -1.0, False, 1e-4)
    check_solution((cost, *others), None, (1.0, 2.0), 4, -1.0, False, 2e-4)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("kind, rho", [(kind, FREE) for kind in KINDS] + [("masked", (0.9, 2.0))])
def test_implicit_gradient(kind, rho, small, monkeypatch):
    if not small:
        monkeypatch.setattr(implicit, "ENTRIES", -1)
        monkeypatch.setattr(implicit, "STEPS", 24)
    args = problem(kind, N=17, M=9)
    settings = Settings(*rho, 30, -1.0, False, args[7] is not None)
    rest = [t.float() for t in dense.sinkhorn(Problem(*wide(args)), None, settings)[:2]]
    rest += [randn(*t.shape, device=DEVICE, seed=8) for t in rest]
    for n, t in enumerate(rest[2:]):  # nothing asks for what is not there
        t[rest[n].isinf()] = 0
    rest[3][:, 0] += rest[2].sum(1) - rest[3].sum(1)
    found = implicit.sinkhorn_backward(*args, *rest, *rho)
    close(found, sinkhorn_ops._formula_backward(*wide(args), *wide(rest), *rho), 1e-4)


@pytest.mark.parametrize("kind, rho", [(k, FREE) for k in KINDS] + [("dustbin", (0.9, 2.0))])
def test_unrolled_gradient(kind, rho):
    args = problem(kind, N=17, M=9)
    start = 0.1 * randn(*args[2].shape, device=DEVICE, seed=9) if kind == "plain" else None
    grads = [randn(*t.shape, device=DEVICE, seed=8) for t in args[1:3]]
    settings = Settings(*rho, 3, -1.0, False, args[7] is not None)
    potentials = dense.sinkhorn(Problem(*args), start, settings)
    for t, grad in zip(potentials[:2], grads, strict=True):
        grad[t.isinf()] = 0
    found = unrolled.sinkhorn_unrolled_backward(*args, start, *grads, *rho, 3)
    exact = wide((start, *grads))
    close(found, sinkhorn_ops._formula_unrolled_backward(*wide(args), *exact, *rho, 3), 1e-4)
