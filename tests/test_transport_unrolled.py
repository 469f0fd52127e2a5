"""The gradient of so many iterations, against PyTorch's own through the loop."""

import pytest
import torch

from weft.reference.transport import dense
from weft.reference.transport.dense import Problem
from weft.reference.transport.sinkhorn import Settings
from weft.reference.transport.unrolled import sinkhorn_unrolled_backward

INF = torch.inf


def problem(border: bool, masked: bool, ragged: bool) -> tuple[Problem, torch.Tensor]:
    torch.manual_seed(0)
    B, N, M = 3, 5, 4
    cost = torch.randn(B, N, M, dtype=torch.float64)
    a = torch.rand(B, N + border, dtype=torch.float64) + 0.1
    b = torch.rand(B, M + border, dtype=torch.float64) + 0.1
    a[0, 1] = b[1, 2] = 0
    mask = torch.rand(B, N, M) < 0.8 if masked else None
    if masked:
        mask[0, 2] = mask[2, :, 1] = False
    rows = torch.tensor([5, 3, 4]) if ragged else None
    columns = torch.tensor([2, 4, 3]) if ragged else None
    bins = torch.randn(B, 3, dtype=torch.float64) if border else None
    epsilon = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    p = Problem(cost, a, b, epsilon, mask, rows, columns, bins, True)
    return p, torch.randn(b.shape, dtype=torch.float64)


@pytest.mark.parametrize("rho", [(INF, INF), (0.5, INF), (INF, 2.0), (0.5, 2.0)], ids=str)
@pytest.mark.parametrize("border", [False, True], ids=["plain", "dustbin"])
@pytest.mark.parametrize("masked, ragged", [(False, False), (True, False), (True, True)])
def test_is_the_gradient_of_the_loop(rho, border, masked, ragged):
    p, start = problem(border, masked, ragged)
    settings = Settings(*rho, 4, -1.0, False, border)
    names = ["cost", "a", "b", "epsilon", "border"] if border else ["cost", "a", "b", "epsilon"]
    leaves = [getattr(p, name).clone().requires_grad_() for name in names]
    first = start.clone().requires_grad_()
    q = Problem(**{**vars(p), **dict(zip(names, leaves, strict=True))})
    f, g, *_ = dense.sinkhorn(q, first, settings)
    upstream = torch.randn_like(f), torch.randn_like(g)
    expected = torch.autograd.grad((f, g), [*leaves, first], upstream)
    found = sinkhorn_unrolled_backward(*upstream, p, start, settings)
    found = [t for t in found if t is not None]
    for one, two in zip(found, expected, strict=True):
        assert two.isfinite().all() and two.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
