"""The plan of cost matrices and the gradients: the C++ kernels against the reference in float64,
gradients against autograd through plain loops, and what no kernel may read."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import weft
from weft import native
from weft.ops.transport.plan import plan, plan_backward, value, value_backward
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
    tiny: tuple[int, ...] = ()  # rows and columns with weights that are nearly 0
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
    "tiny weights of rows": Options(tiny=(2,), row=True),
    "tiny weights": Options(tiny=(2, 3), zeros=True),
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
    for weights, number in zip((a, b), o.tiny, strict=False):
        weights[:, number] = 1e-33
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
@pytest.mark.parametrize("rho", [(INF, INF), (1.5, 0.4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_value_and_its_gradients(name, rho):
    p = problem(OPTIONS[name])
    f, g = potentials(p)
    agree(both(value, *arguments_of(p), f, g, *rho))
    agree(both(value_backward, *arguments_of(p), f, g, randn(p.cost.shape[0]), *rho))


@needs_native
@pytest.mark.parametrize("rho", [(INF, INF), (INF, 0.7), (1.5, 0.4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_implicit_gradients(name, rho):
    p = problem(OPTIONS[name])
    f, g = dense.sinkhorn(p, None, Settings(*rho, 30, -1.0, False, p.border is not None))[:2]
    grad_f, grad_g = cotangents(p)
    agree(both(backward, *arguments_of(p), f, g, grad_f, grad_g, *rho), 1e-9)


@needs_native
@pytest.mark.parametrize("rho", [(INF, INF), (0.7, INF)])
@pytest.mark.parametrize("name", OPTIONS)
def test_unrolled_gradients(name, rho):
    p = problem(OPTIONS[name])
    grad_f, grad_g = cotangents(p)
    for start, iterations in ((None, 1), (None, 6), (randn(*p.b.shape, seed=11), 3)):
        rest = (start, grad_f, grad_g, *rho, iterations)
        agree(both(unrolled_backward, *arguments_of(p), *rest))


def calls(p: Problem, rho: tuple[float, float] = (INF, INF)):
    """Each kernel with arguments of p: op and what follows the problem."""
    near = Settings(*rho, 5, -1.0, False, p.border is not None)
    f, g = dense.sinkhorn(p, None, near)[:2]
    grad_f, grad_g = (t.to(p.a.dtype) for t in cotangents(p))
    grad = randn(p.cost.shape[0], p.a.shape[1], p.b.shape[1], seed=8).to(p.cost.dtype)
    return [
        (plan, (f, g, False)),
        (plan_backward, (f, g, grad, False)),
        (value, (f, g, *rho)),
        (value_backward, (f, g, grad[:, 0, 0].to(p.a.dtype), *rho)),
        (backward, (f, g, grad_f, grad_g, *rho)),
        (unrolled_backward, (None, grad_f, grad_g, *rho, 5)),
    ]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["many rows", "dustbin", "zero weights"])
def test_other_dtypes(name, dtype):
    """Errors against float64 of the same numbers are as those of the formula in that dtype."""
    p = problem(OPTIONS[name], dtype)
    wide = Problem(*(t.double() if is_float(t) else t for t in arguments_of(p)))
    for op, rest in calls(p):
        wide_rest = [t.double() if is_float(t) else t for t in rest]
        with weft.use("cpu"):
            found = tensors(op(*arguments_of(p), *rest))
        with weft.use("reference"):
            plain = tensors(op(*arguments_of(p), *rest))
            truth = tensors(op(*arguments_of(wide), *wide_rest))
        for mine, theirs, true in zip(found, plain, truth, strict=True):
            if true.numel():
                rounding = 16 * torch.finfo(mine.dtype).eps * float(true.abs().amax())
                error = float((theirs - true).abs().amax())
                assert float((mine - true).abs().amax()) <= 3 * error + rounding, op.name


def tensors(results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def padded(p: Problem, rows: int, columns: int) -> Problem:
    """The same with NaN behind the lengths."""
    B, N, M = p.cost.shape

    def wider(w: Tensor, count: int, more: int) -> Tensor:
        filler = w.new_full((B, more), torch.nan)
        return torch.cat([w[:, :count], filler, w[:, count:]], 1)

    cost = p.cost.new_full((B, N + rows, M + columns), torch.nan)
    cost[:, :N, :M] = p.cost
    lengths = torch.full((B,), N), torch.full((B,), M)
    return replace(
        p,
        cost=cost,
        a=wider(p.a, N, rows),
        b=wider(p.b, M, columns),
        rows=lengths[0],
        columns=lengths[1],
    )


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["many rows", "row", "column"])
def test_padding_changes_no_bit(name, dtype):
    p = problem(OPTIONS[name], dtype)
    (B, N, M), (rows, columns) = p.cost.shape, (40, 21)
    q = padded(p, rows, columns)

    keep_rows = torch.tensor([*range(N), *range(N + rows, q.a.shape[1])])
    keep_columns = torch.tensor([*range(M), *range(M + columns, q.b.shape[1])])

    def cut(t: Tensor) -> Tensor:
        if t.dim() == 3:
            columns_of_it = keep_columns if t.shape[2] == q.b.shape[1] else keep_columns[:M]
            t = t[:, keep_rows if t.shape[1] == q.a.shape[1] else keep_rows[:N]]
            return t[:, :, columns_of_it]
        if t.dim() == 2 and t.shape[1] == q.a.shape[1]:
            return t[:, keep_rows]
        return t[:, keep_columns] if t.dim() == 2 and t.shape[1] == q.b.shape[1] else t

    def back(t):
        """t with NaN behind the lengths."""
        if not is_float(t) or t.dim() == 1:
            return t
        wide = t.new_full([n + e for n, e in zip(t.shape, extra(t), strict=True)], torch.nan)
        index = [torch.arange(B)] + [keep_rows if e == rows else keep_columns for e in extra(t)[1:]]
        wide[torch.meshgrid(*index, indexing="ij")] = t
        return wide

    def extra(t: Tensor) -> list[int]:
        if t.dim() == 3:
            return [0, rows, columns]
        return [0, rows if t.shape[1] == p.a.shape[1] else columns]

    with weft.use("cpu"):
        for op, rest in calls(p):
            few = op(*arguments_of(p), *rest)
            many = op(*arguments_of(q), *(back(t) for t in rest))
            single = isinstance(few, Tensor)
            for n, (x, y) in enumerate(
                zip((few,) if single else few, (many,) if single else many, strict=True)
            ):
                assert torch.equal(x, cut(y)), f"{op.name}: result {n}"
                assert not y.isnan().any() and float(y.abs().sum()) == pytest.approx(
                    float(x.abs().sum())
                )


@needs_native
@pytest.mark.parametrize("name", ["many rows", "mask", "dustbin"])
def test_hidden_costs_are_not_read_and_have_no_gradient(name):
    p = problem(OPTIONS[name])
    p = replace(p, mask=hidden(problem(replace(OPTIONS[name], mask=True))).logical_not())
    none = hidden(p)
    q = replace(p, cost=p.cost.masked_fill(none, torch.nan))
    with weft.use("cpu"):
        for op, rest in calls(p):
            one, other = op(*arguments_of(p), *rest), op(*arguments_of(q), *rest)
            if isinstance(one, Tensor):
                assert torch.equal(one, other)
                continue
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
            assert other[0][none].eq(0).all()


@needs_native
def test_threads_change_no_bit():
    before = torch.get_num_threads()
    results = []
    for o in (OPTIONS["many rows"], replace(OPTIONS["dustbin"], B=2, N=70, M=65)):
        p = problem(o, torch.float32)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                with weft.use("cpu"):
                    found = [op(*arguments_of(p), *rest) for op, rest in calls(p)]
            finally:
                torch.set_num_threads(before)
            results.append([t for r in found for t in ((r,) if isinstance(r, Tensor) else r)])
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
        results.clear()
