"""The algebra of pair functions and reductions: closed forms, edges, memory, plans."""

import itertools
import math
import threading
import time

import pytest
import torch
from conftest import IMPLEMENTATIONS, running
from hypothesis import given, settings
from hypothesis import strategies as st

import weft
from weft import PairMask
from weft.ops.cases import randn
from weft.ops.pairwise.pairs import PAIRS
from weft.ops.pairwise.planner import BACKWARD, FORWARD, plan_on_cpu

HYPERBOLIC = ("poincare", "lorentz")
DENSE = ("sum", "mean", "logsumexp")


def points(pair, N, M, D, seed=0):
    """Float64 points where the pair function is defined."""
    x, y = randn(N, D, seed=seed).double(), randn(M, D, seed=seed + 1).double()
    if pair == "poincare":
        return 0.5 * x / (1 + x.norm(dim=-1, keepdim=True)), 0.5 * y / (
            1 + y.norm(dim=-1, keepdim=True)
        )
    if pair == "lorentz":
        lift = lambda t: torch.cat([(1 + t.square().sum(-1, keepdim=True)).sqrt(), t], 1)  # noqa: E731
        return lift(x), lift(y)
    return x, y


def oracle(x, y, pair):
    """Every pair by its formula, one element after the other in effect: differences, float64."""
    difference = x[:, None] - y[None]
    square = difference.square().sum(-1)
    if pair in ("dot", "cosine"):
        lengths = x.norm(dim=-1)[:, None] * y.norm(dim=-1) if pair == "cosine" else 1
        return x @ y.T / lengths
    if pair == "lorentz":
        product = x[:, 1:] @ y[:, 1:].T - x[:, :1] * y[:, 0]
        return torch.acosh(-product)
    if pair == "poincare":
        room = (1 - x.square().sum(-1))[:, None] * (1 - y.square().sum(-1))
        return torch.acosh(1 + 2 * square / room)
    return {
        "sqeuclidean": square,
        "euclidean": square.sqrt(),
        "mahalanobis": square.sqrt() * 2,
        "l1": difference.abs().sum(-1),
        "rbf": (-square).exp(),
        "log": ((square + 1) / (square + 1e-4)).log(),
    }[pair]


def options_of(pair, x):
    return {"precision": 4 * torch.eye(x.shape[1]).double()} if pair == "mahalanobis" else {}


def masks(N, M):
    dense = randn(N, M, seed=9) > 0
    dense[0] = False
    labels = torch.arange(N) % 3, torch.arange(M) % 4
    return {
        "none": None,
        "dense": dense,
        "same": PairMask.same(*labels),
        "different": PairMask.different(*labels) & PairMask(dense) & PairMask.distinct(),
    }


def reduced(s, allowed, reduce):
    if reduce == "logsumexp":
        return s.masked_fill(~allowed, -torch.inf).logsumexp(1)
    total = s.masked_fill(~allowed, 0).sum(1)
    return total if reduce == "sum" else total / allowed.sum(1).clamp_min(1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("D", [3, 41])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_reduction_mask_and_side(pair, D, implementation):
    N, M = 13, 70
    x, y = points(pair, N, M, D)
    s = oracle(x, y, pair)
    given = options_of(pair, x)
    with running(implementation):
        for reduce, (name, mask) in itertools.product(DENSE, masks(N, M).items()):
            allowed = torch.ones(N, M, dtype=torch.bool)
            if mask is not None:
                allowed = mask if name == "dense" else mask.block(0, N, M, x.device)
            over_y, over_x = weft.pairwise(
                x, y, pair=pair, reduce=reduce, over="both", mask=mask, **given
            )
            torch.testing.assert_close(over_y, reduced(s, allowed, reduce))
            torch.testing.assert_close(over_x, reduced(s.T, allowed.T, reduce))
            for k in ("min", "max"):
                worst = torch.inf if k == "min" else -torch.inf
                best, where = getattr(s.masked_fill(~allowed, worst), k)(1)
                found = weft.pairwise(x, y, pair=pair, reduce=k, mask=mask, **given)
                torch.testing.assert_close(found.values, best)
                assert torch.equal(found.indices, where.masked_fill(~allowed.any(1), -1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("E", [1, 3, 17])
def test_sums_of_values(E, implementation):
    x, y, v = randn(9, 20).double(), randn(70, 20, seed=1).double(), randn(70, E, seed=2).double()
    mask = PairMask(randn(9, 70, seed=3) > 0)
    leaves = [t.requires_grad_() for t in (x, y, v)]
    expected = oracle(x, y, "log").masked_fill(~mask.allowed, 0) @ v
    with running(implementation):
        found = weft.pairwise(x, y, pair="log", reduce="sum", values=v, mask=mask)
        swapped = weft.pairwise(y, x, pair="log", reduce="sum", values=v, over="x", mask=mask.mT)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(swapped, expected)
        grads = torch.autograd.grad(found.sin().sum(), leaves)
    of_oracle = torch.autograd.grad(expected.sin().sum(), leaves)
    for one, two in zip(grads, of_oracle, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("over", ["y", "x"])
@pytest.mark.parametrize("reduce", DENSE)
def test_bias_belongs_to_the_columns(reduce, over, implementation):
    x, y, bias = randn(6, 5).double(), randn(8, 5, seed=1).double(), randn(8, seed=2).double()
    mask = randn(6, 8, seed=3) > -1
    leaves = [t.requires_grad_() for t in (x, y, bias)]
    s, allowed = x @ y.T + bias, mask
    if over == "x":
        s, allowed = s.T, mask.T
    expected = reduced(s, allowed, reduce)
    with running(implementation):
        found = weft.pairwise(x, y, pair="dot", bias=bias, reduce=reduce, over=over, mask=mask)
        grads = torch.autograd.grad(found.sin().sum(), leaves)
    torch.testing.assert_close(found, expected)
    for one, two in zip(grads, torch.autograd.grad(expected.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", HYPERBOLIC)
def test_curvature_has_a_gradient(metric, implementation):
    x, y = points(metric, 4, 5, 3)
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with running(implementation):
        distance = lambda c, x: weft.pairwise_distance(x, y, metric, curvature=c)  # noqa: E731
        torch.testing.assert_close(distance(c, x), distance(0.7, x))
        if (
            metric == "lorentz"
        ):  # the points must stay on the hyperboloid: far from it is far from 1
            x = 2 * x
        x.requires_grad_()
        assert torch.autograd.gradcheck(distance, (c, x))
        assert torch.autograd.gradgradcheck(distance, (c, x))
        total = lambda c: weft.pairwise(x, y, pair=metric, reduce="mean", curvature=c)  # noqa: E731
        assert torch.autograd.gradcheck(total, (c,))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("plan", ["direct", "fused"])
def test_offset_points_keep_their_digits(plan, implementation):
    x, y = 1000 + randn(20, 24), 1000 + randn(90, 24, seed=1)
    y[5] = x[3]
    expected = oracle(x.double(), y.double(), "sqeuclidean")
    with running(implementation):
        found = weft.pairwise_distance(x, y, plan=plan)
        assert found[3, 5] == 0
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("plan", ["direct", "fused"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_masked_rows_are_never_read(bad, plan, implementation):
    """A row of NaN or infinity that is masked changes nothing; one that is not reaches its own
    results alone."""
    x, y, v = randn(7, 20), randn(66, 20, seed=1), randn(66, 6, seed=2)
    poisoned, poisoned_v = y.clone(), v.clone()
    poisoned[11], poisoned_v[11] = bad, bad
    mask = torch.ones(7, 66, dtype=torch.bool)
    mask[:, 11] = False
    for pair in ("dot", "rbf", "euclidean", "l1") if plan == "direct" else ("dot", "rbf", "log"):
        for reduce in DENSE:
            of_sum = reduce == "sum"
            results = []
            for to, values in ((y, v), (poisoned, poisoned_v)):
                leaf = x.clone().requires_grad_()
                with running(implementation):
                    out = weft.pairwise(
                        leaf,
                        to,
                        pair=pair,
                        reduce=reduce,
                        mask=mask,
                        plan=plan,
                        values=values if of_sum else None,
                    )
                    results.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
            for one, two in zip(*results, strict=True):
                torch.testing.assert_close(two, one)
    with running(implementation):
        over_x = weft.pairwise(x, poisoned, pair="rbf", reduce="sum", over="x", plan=plan)
    assert over_x.isfinite().sum() >= 65


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_pairs(implementation):
    x, y = randn(3, 5).requires_grad_(), randn(4, 5, seed=1)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    with running(implementation):
        for reduce, empty in (("sum", 0), ("mean", 0), ("logsumexp", -math.inf)):
            out = weft.pairwise(x, y, pair="rbf", reduce=reduce, mask=mask)
            assert bool((out == empty).all())
            assert not torch.autograd.grad(out.sum(), x)[0].any()
        least = weft.pairwise(x, y, pair="rbf", reduce="min", mask=mask)
        assert bool((least.values == math.inf).all() and (least.indices == -1).all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinite_logits(implementation):
    """As ``torch.logsumexp``: infinity is the result, NaN is stronger."""
    x, y = torch.eye(3), torch.zeros(70, 3)
    y[69, 0], y[68, 1] = math.inf, math.nan
    x = torch.tensor([[1.0, 1e-30, 1e-30], [1e-30, 1.0, 1e-30], [1e-30, 1e-30, 1.0]])
    y[:, 2] = -math.inf
    with running(implementation):
        out = weft.pairwise(x[2:], y[:60], pair="dot", reduce="logsumexp")
        assert out.item() == -math.inf
        y[:, 2] = 0
        y[68] = 0
        assert weft.pairwise(x[:1], y, pair="dot", reduce="logsumexp").item() == math.inf
        y[68, 1] = math.nan
        assert weft.pairwise(x, y, pair="dot", reduce="logsumexp").isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 140),
    st.integers(0, 40),
    st.sampled_from(["dot", "rbf", "log", "l1", "cosine"]),
    st.sampled_from(DENSE),
    st.sampled_from(["none", "dense", "same", "different"]),
    st.sampled_from(["y", "x"]),
)
def test_any_shape(N, M, D, pair, reduce, mask, over):
    x, y = randn(N, D).double(), randn(M, D, seed=1).double()
    known = None if not N else masks(N, M)[mask]
    results = []
    for name in ("reference", None):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        with weft.use(name):
            out = weft.pairwise(*leaves, pair=pair, reduce=reduce, over=over, mask=known)
            finite = torch.where(out.isfinite(), out, 0)
            results.append((out.detach(), *torch.autograd.grad(finite.sin().sum(), leaves)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_plans():
    """The crossover that docs/pairwise/algebra.md measures."""
    assert FORWARD == {"dot": 16, "sqeuclidean": 16} and BACKWARD == {"dot": 3, "sqeuclidean": 3}
    for up_to in (FORWARD, BACKWARD):
        for base, depth in up_to.items():
            assert plan_on_cpu("auto", base, depth, up_to) == "direct"
            assert plan_on_cpu("auto", base, depth + 1, up_to) == "fused"
            assert plan_on_cpu("fused", base, 1, up_to) == "fused"
            assert plan_on_cpu("direct", base, 1000, up_to) == "direct"
        assert plan_on_cpu("auto", "l1", 1000, up_to) == "direct"


@pytest.mark.parametrize("pair", ["dot", "rbf"])
def test_plans_agree(pair):
    x, y = randn(300, 12).double(), randn(1100, 12, seed=1).double()
    one, two = (
        weft.pairwise(x, y, pair=pair, reduce="logsumexp", plan=plan)
        for plan in ("direct", "fused")
    )
    torch.testing.assert_close(one, two)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def peak_of(function) -> int:
    """The growth of the resident set while ``function`` runs."""
    peak, done, before = 0, threading.Event(), resident()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(peak, resident()) - before


@pytest.mark.skipif(weft.native.cpu_level is None, reason="the reference stores all pairs")
@pytest.mark.parametrize("D", [8, 64])
def test_memory_does_not_grow_with_the_pairs(D):
    def run(N):
        x, y = randn(N, D).requires_grad_(), randn(N, D, seed=1).requires_grad_()
        return lambda: weft.pairwise(x, y, pair="rbf", gamma=0.1, reduce="sum").sum().backward()

    run(512)()
    small, large = peak_of(run(4096)), peak_of(run(8192))
    # A matrix of all pairs would take 64 MB and 256 MB.
    assert small < 48 << 20 and large < small + (12 << 20), (small, large)
