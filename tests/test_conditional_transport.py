"""Conditional transport: the definition by loops, its limits, and points without weight."""

import math

import pytest
import torch
from conftest import IMPLEMENTATIONS, running

import weft
from weft.ops.cases import randn

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def cosine_cost(x, y):
    return 1 - sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def by_loops(x, y, a, b, rho, temperature):
    """One problem in Python numbers: (value, to_y, to_x)."""
    cost = [[cosine_cost(p, q) for q in y] for p in x]
    to_y = [[v * math.exp(-c / temperature) for v, c in zip(b, row, strict=True)] for row in cost]
    to_y = [[e / sum(row) for e in row] for row in to_y]
    columns = [
        [w * math.exp(-c / temperature) for w, c in zip(a, column, strict=True)]
        for column in zip(*cost, strict=True)
    ]
    to_x = [[column[i] / sum(column) for column in columns] for i in range(len(x))]
    value = 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            share = rho * a[i] / sum(a) * to_y[i][j] + (1 - rho) * b[j] / sum(b) * to_x[i][j]
            value += share * cost[i][j]
    return value, to_y, to_x


def points(B=3, N=7, M=5, D=4):
    x, y = (randn(B, n, D, dtype=torch.float64, seed=n) for n in (N, M))
    a, b = (randn(B, n, dtype=torch.float64, seed=n + 1).abs() + 0.1 for n in (N, M))
    return x, y, a, b


@every_implementation
def test_is_the_definition(implementation):
    x, y, a, b = points()
    dtype = torch.float32 if implementation == "triton" else torch.float64
    arguments = [t.to(dtype) for t in (x, y, a, b)]
    with running(implementation):
        found = weft.conditional_transport(*arguments, rho=0.3, temperature=0.2, return_plans=True)
    for problem, values in enumerate(zip(x, y, a, b, strict=True)):
        expected = by_loops(*(t.tolist() for t in values), 0.3, 0.2)
        for one, other in zip(found, expected, strict=True):
            other = torch.tensor(other, dtype=dtype)
            torch.testing.assert_close(one[problem], other)


@every_implementation
def test_cold_is_the_nearest_point_and_hot_the_mean(implementation):
    """At any temperature of the dtype, down to the smallest, and with finite gradients."""
    x, y, a, b = (t.float().requires_grad_() for t in points())
    unit = [torch.nn.functional.normalize(t.detach().double(), dim=-1) for t in (x, y)]
    cost = 1 - unit[0] @ unit[1].mT
    sa, sb = (t.detach().double() / t.detach().double().sum(-1, keepdim=True) for t in (a, b))
    nearest = (sa * cost.amin(2)).sum(1) / 2 + (sb * cost.amin(1)).sum(1) / 2
    mean = torch.einsum("bi,bij,bj->b", sa, cost, sb)
    for temperature in (1e-40, 1e-20, 1e-4, 1e6, 1e30):
        with running(implementation):
            found = weft.conditional_transport(x, y, a, b, temperature=temperature)
            grads = torch.autograd.grad(found.sum(), (x, y, a, b))
        expected = nearest if temperature < 1 else mean
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert all(g.isfinite().all() for g in grads)


@every_implementation
def test_equal_points_cost_nothing(implementation):
    x = randn(2, 6, 3)
    with running(implementation):
        cosine = weft.conditional_transport(x, 2 * x, temperature=1e-3)
        squares = weft.conditional_transport(x, x, metric="sqeuclidean", temperature=1e-3)
    torch.testing.assert_close(cosine, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(squares, torch.zeros(2), atol=1e-5, rtol=0)


@every_implementation
def test_points_without_weight_take_no_part(implementation):
    """Neither their values, which may be NaN, nor their weights have a part or a gradient."""
    x, y, a, b = (t.float() for t in points())
    x_lengths, y_lengths = torch.tensor([7, 3, 0]), torch.tensor([2, 5, 5])
    padded_x, padded_y, b = x.clone(), y.clone(), b.clone()
    b[1, 2] = 0
    padded_y[1, 2] = torch.nan
    for k in range(3):
        padded_x[k, x_lengths[k] :] = torch.nan
        padded_y[k, y_lengths[k] :] = torch.inf
    leaves = [t.requires_grad_() for t in (padded_x, padded_y, a, b)]
    lengths = {"x_lengths": x_lengths, "y_lengths": y_lengths}
    with running(implementation):
        found = weft.conditional_transport(*leaves, **lengths, temperature=0.1)
        grads = torch.autograd.grad(found.sum(), leaves)
        assert found[2] == 0 and all((g[2] == 0).all() for g in grads)
        for k in (0, 1):
            rows = torch.arange(7) < x_lengths[k]
            columns = (torch.arange(5) < y_lengths[k]) & (b[k] > 0)
            alone = [x[k, rows], y[k, columns], a[k, rows], b[k, columns]]
            alone = [t[None].detach().requires_grad_() for t in alone]
            expected = weft.conditional_transport(*alone, temperature=0.1)
            torch.testing.assert_close(found[k : k + 1], expected)
            own = torch.autograd.grad(expected.sum(), alone)
            for g, used, one in zip(grads, (rows, columns) * 2, own, strict=True):
                torch.testing.assert_close(g[k][used], one[0])
                assert (g[k][~used] == 0).all()


@every_implementation
def test_shared_points_are_the_same_in_each_problem(implementation):
    x, y, _, b = (t.float() for t in points())
    with running(implementation):
        shared = weft.conditional_transport(x, y[0], b=b[0])
        copied = weft.conditional_transport(x, y[:1].expand(3, 5, 4), b=b[:1].expand(3, 5))
    torch.testing.assert_close(shared, copied)


def test_gradient_of_the_temperature():
    x, y, a, b = points(B=2, N=4, M=3)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    function = lambda t: weft.conditional_transport(x, y, a, b, temperature=t)  # noqa: E731
    assert torch.autograd.gradcheck(function, temperature)
    assert torch.autograd.gradgradcheck(function, temperature)


@every_implementation
def test_many_blocks_and_wide_rows(implementation):
    """Blocks of rows are merged, and rows longer than a partial sum added."""
    dtype = torch.float32 if implementation == "triton" else torch.float64
    x, y = (randn(1, n, 3, dtype=dtype, seed=n).requires_grad_() for n in (140, 1100))
    results = []
    for run in (weft.use("reference"), running(implementation)):
        with run:
            value = weft.conditional_transport(x, y, temperature=0.05)
            results.append((value, *torch.autograd.grad(value.sum(), (x, y))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@every_implementation
def test_a_nan_spreads(implementation):
    x, y, a, b = (t.float() for t in points())
    x[0, 1, 2] = torch.nan
    with running(implementation):
        value = weft.conditional_transport(x, y, a, b)
    assert value[0].isnan() and value[1:].isfinite().all()
