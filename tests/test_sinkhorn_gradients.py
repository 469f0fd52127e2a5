"""Gradients through what ``weft.sinkhorn`` returns, on the C++ kernels: plain loops, gradcheck."""

import pytest
import torch
from test_transport_gradients import agree, needs_native, randn
from torch import Tensor

import weft


def plain_loop(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, iterations: int) -> Tensor:
    """The plan, by a loop without any of this library."""
    log_a, log_b = a.log()[:, None], b.log()
    g = torch.zeros_like(b)
    for _ in range(iterations):
        f = -epsilon * torch.logsumexp(log_b + (g - cost) / epsilon, 1)
        g = -epsilon * torch.logsumexp(log_a + (f[:, None] - cost) / epsilon, 0)
    return (log_a + log_b + (f[:, None] + g - cost) / epsilon).exp()


def leaves(N: int, M: int, epsilon: float) -> list[Tensor]:
    cost, (a, b) = randn(N, M, seed=1).square(), (randn(n, seed=n).abs() + 0.1 for n in (N, M))
    tensors = cost, a / a.sum(), b / b.sum(), torch.tensor(epsilon, dtype=torch.float64)
    return [t.requires_grad_() for t in tensors]


@needs_native
@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
def test_gradients_through_the_plan_are_those_of_a_plain_loop(gradient):
    inputs, weights = leaves(24, 31, 0.1), randn(24, 31, seed=2)
    count = 25 if gradient == "unrolled" else 1000
    options = {"max_iterations": count} if gradient == "unrolled" else {"tolerance": 1e-13}
    with weft.use("cpu"):
        *tensors, epsilon = inputs
        P = weft.sinkhorn(*tensors, epsilon=epsilon, gradient=gradient, **options).plan
        found = torch.autograd.grad((P * weights).sum() + P.square().sum(), inputs)
    want = plain_loop(*inputs, count)
    torch.testing.assert_close(P, want, rtol=1e-9, atol=1e-13)
    want = list(torch.autograd.grad((want * weights).sum() + want.square().sum(), inputs))
    found = list(found)
    for n in (1, 2):  # weights may change by what keeps their sum
        found[n], want[n] = (t - t.mean() for t in (found[n], want[n]))
    agree(list(zip(found, want, strict=True)), 1e-8)


@needs_native
@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "dustbin", "partial", "unrolled"])
def test_gradcheck_through_the_plan(kind):
    cost, a, b, epsilon = leaves(4, 5, 0.4)
    options = {
        "balanced": {},
        "unbalanced": {"rho": (0.8, 1.5)},
        "dustbin": {"dustbin": torch.tensor(0.3, dtype=torch.float64, requires_grad=True)},
        "partial": {"mass": 0.6},
        "unrolled": {"gradient": "unrolled", "max_iterations": 4, "rho": (0.8, None)},
    }[kind]
    if kind != "unrolled":
        options |= {"tolerance": 1e-14, "max_iterations": 3000}
    border = options.pop("dustbin", None)
    extra = () if border is None else (border,)

    def plan_of(cost, a, b, epsilon, *border):
        more = {"dustbin": border[0]} if border else {}
        return weft.sinkhorn(
            cost, a, b / b.sum() * a.sum(), epsilon=epsilon, **options, **more
        ).plan

    with weft.use("cpu"):
        assert torch.autograd.gradcheck(
            plan_of, (cost, a, b, epsilon, *extra), atol=1e-7, rtol=1e-5
        )


@needs_native
def test_zero_weights_have_finite_gradients():
    cost, a, b, epsilon = leaves(6, 7, 0.05)
    a, b = (t.detach().clone() for t in (a, b))
    a[2], b[3] = 0, 0
    a, b = ((t / t.sum()).requires_grad_() for t in (a, b))
    for gradient in ("implicit", "unrolled"):
        with weft.use("cpu"):
            found = weft.sinkhorn(
                cost, a, b, epsilon=epsilon, max_iterations=300, gradient=gradient
            )
            (found.plan.square().sum() + found.value).backward()
        assert all(t.grad.isfinite().all() for t in (cost, a, b, epsilon))
        assert a.grad[2] != 0 and b.grad[3] != 0


@needs_native
def test_gradients_do_not_depend_on_where_memory_lies():
    """Of small problems, whose vectors are now far from each other, now side by side: that changes
    as the calls between do."""
    inputs = [randn(2, 4, 5, seed=1), *(randn(2, n, seed=n).softmax(1) for n in (4, 5))]
    for t in inputs:
        t.requires_grad_()
    options = {"rho": (None, 0.7), "max_iterations": 40, "tolerance": -1.0}
    runs = []
    for _ in range(10):
        run = []
        with weft.use("cpu"):
            found = weft.sinkhorn(*inputs, epsilon=1.0, **options)
            for result in (*found.potentials, found.plan, found.value):
                for along in torch.eye(result.numel(), dtype=torch.float64)[::2]:
                    along = along.view_as(result)
                    run += torch.autograd.grad(result, inputs, along, retain_graph=True)
        runs.append(run)
    for run in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(run, runs[0], strict=True))
