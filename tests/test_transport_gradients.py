"""The plan of cost matrices and the gradients: the C++ kernels against the reference in float64,
gradients against autograd through plain loops, and what no kernel may read."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import weft
from weft import native
from weft.ops.transport.plan import plan, plan_backward, value_backward
from weft.ops.transport.problem import arguments_of
from weft.ops.transport.sinkhorn import backward, unrolled_backward
from weft.reference.transport import dense
from weft.reference.transport.dense import Problem
from weft.reference.transport.sinkhorn import Settings

needs_native = pytest.mark.skipif(
    native.missing.get("cpu") is not None, reason="the C++ kernels are not built here"
)
INF = torch.inf


@dataclass(frozen=True)
class Options:
    B: int = 2
    N: int = 7
    M: int = 19
    mask: bool = False
    lengths: bool = False
    row: bool = False
    column: bool = False
    similarity: bool = False
    zeros: bool = False
    transposed: bool = False
    epsilon: float = 0.3


OPTIONS = {
    "plain": Options(),
    "many rows": Options(B=1, N=75, M=33),
    "mask": Options(mask=True),
    "lengths": Options(lengths=True),
    "dustbin": Options(row=True, column=True, lengths=True, mask=True),
    "row": Options(row=True),
    "column": Options(column=True, similarity=True),
    "similarity": Options(similarity=True),
    "zero weights": Options(zeros=True),
    "transposed": Options(transposed=True, mask=True, M=5),
    "small epsilon": Options(B=1, epsilon=0.02),
    "one": Options(N=1, M=1),
    "no columns": Options(M=0),
    "no rows": Options(N=0),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def problem(o: Options, dtype: torch.dtype = torch.float64) -> Problem:
    """A balanced one: both weights have mass 1."""
    cost = randn(o.B, o.M, o.N, seed=1).mT if o.transposed else randn(o.B, o.N, o.M, seed=1)
    a = randn(o.B, o.N + o.row, seed=2).abs() + 0.1
    b = randn(o.B, o.M + o.column, seed=3).abs() + 0.1
    if o.zeros:
        a[:, 1::3], b[:, ::4] = 0, 0
    mask = randn(o.B, o.N, o.M, seed=4) > -0.5 if o.mask else None
    if mask is not None and o.transposed:
        mask = mask.mT.contiguous().mT
    rows = torch.tensor([o.N - 2, o.N]) if o.lengths else None
    columns = torch.tensor([o.M, o.M - 3]) if o.lengths else None
    border = randn(o.B, 3, seed=5) if o.row or o.column else None
    if o.lengths:
        a[0, o.N - 2 : o.N], b[1, o.M - 3 : o.M] = 0, 0
    a, b = (w / w.sum(1, keepdim=True).clamp_min(1e-9) for w in (a, b))
    epsilon = o.epsilon * (1 + torch.arange(o.B, dtype=torch.float64) / 4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, epsilon = (t.to(wide) for t in (a, b, epsilon))
    border = None if border is None else border.to(wide)
    return Problem(cost.to(dtype), a, b, epsilon, mask, rows, columns, border, o.similarity)


def hidden(p: Problem) -> Tensor:
    """(B, N, M): what a mask or a length hides."""
    B, N, M = p.cost.shape
    seen = torch.ones(B, N, M, dtype=torch.bool) if p.mask is None else p.mask
    if p.rows is not None:
        seen = seen & (torch.arange(N) < p.rows[:, None])[:, :, None]
    if p.columns is not None:
        seen = seen & (torch.arange(M) < p.columns[:, None])[:, None]
    return ~seen


def both(op, *args) -> list[tuple[Tensor, Tensor]]:
    """Results of the C++ kernel beside those of the reference."""
    results = []
    for name in ("cpu", "reference"):
        with weft.use(name):
            out = op(*args)
        results.append(out if isinstance(out, tuple | list) else (out,))
    assert all(
        m.shape == r.shape and m.stride() == r.stride() for m, r in zip(*results, strict=True)
    )
    return list(zip(*results, strict=True))


def agree(pairs: list[tuple[Tensor, Tensor]], tolerance: float = 1e-11) -> None:
    for index, (mine, want) in enumerate(pairs):
        scale = (
            max(1.0, float(torch.where(want.isfinite(), want, 0).abs().amax()))
            if want.numel()
            else 1
        )
        text = lambda given, i=index: f"result {i}: {given}"  # noqa: E731
        torch.testing.assert_close(mine, want, rtol=tolerance, atol=tolerance * scale, msg=text)


def potentials(p: Problem, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    """Any: not of an optimum."""
    f, g = (scale * randn(*w.shape, seed=s).to(w.dtype) for w, s in ((p.a, 6), (p.b, 7)))
    if p.rows is not None:
        f = torch.where((p.a == 0) & (torch.arange(f.shape[1]) >= p.rows[:, None]), -INF, f)
    if p.columns is not None:
        g = torch.where((p.b == 0) & (torch.arange(g.shape[1]) >= p.columns[:, None]), -INF, g)
    return f, g


def cotangents(p: Problem) -> tuple[Tensor, Tensor]:
    """Of f and g, 0 beyond the lengths."""
    f, g = potentials(p)
    grad_f, grad_g = randn(*p.a.shape, seed=9), randn(*p.b.shape, seed=10)
    return grad_f.masked_fill(f == -INF, 0), grad_g.masked_fill(g == -INF, 0)


@needs_native
@pytest.mark.parametrize("log", [False, True], ids=["plan", "log"])
@pytest.mark.parametrize("name", OPTIONS)
def test_plan_and_its_gradients(name, log):
    p = problem(OPTIONS[name])
    f, g = potentials(p)
    agree(both(plan, *arguments_of(p), f, g, log))
    grad = randn(p.cost.shape[0], p.a.shape[1], p.b.shape[1], seed=8)
    for upstream in (grad, grad.mT.contiguous().mT, grad[:, :1, :1].expand_as(grad)):
        agree(both(plan_backward, *arguments_of(p), f, g, upstream, log))


@needs_native
@pytest.mark.parametrize("rho", [(INF, INF), (0.7, INF), (1.5, 0.4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_the_value(name, rho):
    p = problem(OPTIONS[name])
    f, g = potentials(p)
    agree(both(value_backward, *arguments_of(p), f, g, randn(p.cost.shape[0]), *rho))


@needs_native
@pytest.mark.parametrize("rho", [(INF, INF), (0.7, INF), (1.5, 0.4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_implicit_gradients(name, rho):
    p = problem(OPTIONS[name])
    f, g = dense.sinkhorn(p, None, Settings(*rho, 30, -1.0, False, p.border is not None))[:2]
    grad_f, grad_g = cotangents(p)
    agree(both(backward, *arguments_of(p), f, g, grad_f, grad_g, *rho), 1e-9)


@needs_native
@pytest.mark.parametrize("rho", [(INF, INF), (0.7, INF), (INF, 0.4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_unrolled_gradients(name, rho):
    p = problem(OPTIONS[name])
    grad_f, grad_g = cotangents(p)
    for start, iterations in ((None, 1), (None, 6), (randn(*p.b.shape, seed=11), 3)):
        rest = (start, grad_f, grad_g, *rho, iterations)
        agree(both(unrolled_backward, *arguments_of(p), *rest))
