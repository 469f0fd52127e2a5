"""Transport between points: against matrices of costs, other libraries and closed forms."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import weft

COSTS = ("sqeuclidean", "euclidean", "cosine", "dot")
EXACT = {"tolerance": 1e-12, "memory_budget": 0}


def clouds(N=17, M=23, D=3, seed=0, dtype=torch.float64, batch=()):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, dtype=torch.float64, generator=generator)  # noqa: E731
    x, y = draw(*batch, N, D).to(dtype), (0.5 * draw(*batch, M, D) + 0.3).to(dtype)
    a, b = (draw(*batch, n).abs() + 0.1 for n in (N, M))
    return x, y, *((w / w.sum(-1, keepdim=True)).to(dtype) for w in (a, b))


def cost_matrix(x, y, cost):
    if cost == "dot":
        return -x @ y.mT
    if cost == "cosine":
        return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    squares = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return squares if cost == "sqeuclidean" else squares.sqrt()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("D", [2, 12])
@pytest.mark.parametrize("rho", [None, 1.0, (None, 0.5)])
def test_is_sinkhorn_of_the_costs(cost, D, rho):
    """All results and first and second derivatives; the soft minima never see the matrix."""
    given = [t.requires_grad_() for t in clouds(D=D)]
    epsilon = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    given.append(epsilon)
    x, y, a, b, _ = given
    options = {"epsilon": epsilon, "tolerance": 1e-12, "rho": rho}
    streamed = weft.sinkhorn_points(x, y, a, b, cost=cost, memory_budget=0, **options)
    dense = weft.sinkhorn(cost_matrix(x, y, cost), a, b, **options)
    values = torch.linspace(-1, 1, 2 * 23, dtype=torch.float64).view(23, 2)
    labels = torch.arange(17) % 3, torch.arange(23) % 4
    results = []
    for r in (streamed, dense):
        grads = torch.autograd.grad(r.value, given, create_graph=True)
        loss = r.potentials[0].sin().sum() + r.plan.square().sum() + r.apply(values).cos().sum()
        loss = loss + sum(g.square().sum() for g in grads)
        second = torch.autograd.grad(loss, given)
        joint = r.plan_label_joint(*labels, 3, 4)
        results.append([r.value, *r.potentials, r.plan, r.apply(values), joint, *grads, *second])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("D", [3, 40])
@pytest.mark.parametrize("rho", [None, 1.0])
def test_translation_changes_nothing(cost, D, rho):
    """In float32, and a thousand away, where expanded squares would have no digit left."""
    x, y, a, b = clouds(D=D, dtype=torch.float32)
    x, y = (64 * x).round() / 64, (64 * y).round() / 64  # exact after the translation too
    options = {"cost": cost, "epsilon": 0.5, "rho": rho, "memory_budget": 0, "tolerance": 1e-6}
    here = weft.sinkhorn_points(x, y, a, b, **options, max_iterations=3000)
    there = weft.sinkhorn_points(x + 1024, y + 1024, a, b, **options, max_iterations=3000)
    torch.testing.assert_close(there.value, here.value, rtol=2e-5, atol=0)
    torch.testing.assert_close(there.plan, here.plan, rtol=1e-3, atol=1e-6)


def test_a_cloud_and_its_translate():
    """The plan of squares does not see a translation, which the value has in closed form."""
    x, y, a, b = clouds(D=5)
    t = torch.tensor([3.0, -1, 0.5, 2, 1], dtype=torch.float64)
    base = weft.sinkhorn_points(x, y, a, b, epsilon=0.5, **EXACT)
    moved = weft.sinkhorn_points(x, y + t, a, b, epsilon=0.5, **EXACT)
    means = a @ x, b @ y
    expected = base.value + t.square().sum() + 2 * t @ (means[1] - means[0])
    torch.testing.assert_close(moved.value, expected)
    torch.testing.assert_close(moved.plan, base.plan, rtol=1e-7, atol=1e-12)
    divergence = weft.sinkhorn_divergence(x, x + t, a, a, epsilon=0.5, tolerance=1e-12)
    torch.testing.assert_close(divergence, t.square().sum())


def test_diracs():
    """One point each: everything moves, or so much that the penalties allow."""
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    value = weft.sinkhorn_points(x, y, epsilon=0.1, memory_budget=0).value
    assert float(value) == pytest.approx(25)
    rho, cost, eps = 2.0, 5.0, 0.5
    r = weft.sinkhorn_points(x, y, cost="euclidean", epsilon=eps, rho=rho, **EXACT)
    mass = torch.exp(torch.tensor(-cost / (2 * rho + eps)))
    assert float(r.apply(torch.ones(1, 1, dtype=torch.float64))) == pytest.approx(float(mass))
    assert float(r.value) == pytest.approx((2 * rho + eps) * (1 - float(mass)))


def test_padding_is_never_read():
    x, y, _, _ = clouds(9, 600, 10, dtype=torch.float32, batch=(3,))
    lengths = torch.tensor([9, 4, 7]), torch.tensor([600, 530, 3])
    options = {"epsilon": 2.0, "memory_budget": 0, "max_iterations": 30, "tolerance": -1.0}
    for k in range(3):
        n, m = int(lengths[0][k]), int(lengths[1][k])
        x[k, n:], y[k, m:] = torch.nan, torch.inf
    x.requires_grad_(), y.requires_grad_()
    found = weft.sinkhorn_points(x, y, lengths=lengths, **options)
    grads = torch.autograd.grad(found.value.sum(), (x, y))
    for k in range(3):
        n, m = int(lengths[0][k]), int(lengths[1][k])
        xs, ys = (t.detach()[k, :s].requires_grad_() for t, s in ((x, n), (y, m)))
        one = weft.sinkhorn_points(xs, ys, **options)
        assert torch.equal(found.value[k], one.value)
        assert torch.equal(found.potentials[0][k, :n], one.potentials[0])
        assert (found.potentials[1][k, m:] == -torch.inf).all()
        alone = torch.autograd.grad(one.value, (xs, ys))
        assert torch.equal(grads[0][k, :n], alone[0]) and not grads[0][k, n:].any()
        assert torch.equal(grads[1][k, :m], alone[1]) and not grads[1][k, m:].any()


def test_weights_of_zero():
    """Points without weight move nothing, have potentials, and leave the others as they are."""
    x, y, a, b = clouds(D=4)
    a[3], b[5], b[6] = 0, 0, 0
    a, b = a / a.sum(), b / b.sum()
    given = [t.requires_grad_() for t in (x, y, a, b)]
    r = weft.sinkhorn_points(*given, epsilon=0.5, **EXACT)
    few = weft.sinkhorn_points(x, y[b > 0], a, b[b > 0], epsilon=0.5, **EXACT)
    torch.testing.assert_close(r.value, few.value)
    assert r.potentials[0].isfinite().all() and r.potentials[1].isfinite().all()
    loss = r.value + r.potentials[0].square().sum() + r.potentials[1].sin().sum()
    for grad in torch.autograd.grad(loss + r.plan.square().sum(), given):
        assert grad.isfinite().all()


@pytest.mark.parametrize("rho", [None, 0.7])
def test_gradcheck_through_everything(rho):
    x, y, a, b = clouds(3, 4, 2)

    def results(x, y, a, b, epsilon):
        r = weft.sinkhorn_points(x, y, a, b, epsilon=epsilon, rho=rho, **EXACT)
        return r.value, *r.potentials, r.apply(torch.ones_like(b)[:, None])

    given = [t.requires_grad_() for t in (x, y, a, b)]
    given.append(torch.tensor(1.5, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(results, given)
    assert torch.autograd.gradgradcheck(results, given, fast_mode=True)


def test_unrolled_is_implicit_at_the_end():
    x, y, a, b = clouds(D=9)
    x.requires_grad_()
    grads = []
    for options in ({"gradient": "unrolled", "max_iterations": 150}, {"tolerance": 1e-13}):
        r = weft.sinkhorn_points(x, y, a, b, epsilon=4.0, memory_budget=0, **options)
        grads.append(torch.autograd.grad(r.potentials[0].sin().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


def test_annealing_ends_at_the_same_place():
    x, y, a, b = clouds(D=9)
    one, two = (
        weft.sinkhorn_points(x, y, a, b, epsilon=0.3, schedule=s, max_iterations=5000, **EXACT)
        for s in ("fixed", "anneal")
    )
    torch.testing.assert_close(one.potentials, two.potentials)


@pytest.mark.parametrize("rho", [None, 1.0])
@pytest.mark.parametrize("cost", COSTS)
def test_divergence(cost, rho):
    """Of three values; 0 with a gradient of 0 for equal clouds."""
    x, y, a, b = clouds(9, 11, 3)
    b = b if rho is None else 1.3 * b
    options = {"cost": cost, "epsilon": 0.7, "rho": rho, "tolerance": 1e-11}
    value = weft.sinkhorn_divergence(x, y, a, b, **options)
    dense = [
        weft.sinkhorn(
            cost_matrix(p, q, cost),
            s,
            t,
            **{k: options[k] for k in options if k != "cost"},
            max_iterations=20000,
        ).value
        for p, q, s, t in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    ]
    expected = dense[0] - (dense[1] + dense[2]) / 2 + 0.35 * (a.sum() - b.sum()).square()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    assert value > 0
    x.requires_grad_()
    same = weft.sinkhorn_divergence(x, x.detach().clone(), a, a, **options)
    (grad,) = torch.autograd.grad(same, x)
    assert abs(float(same)) < 1e-9 and float(grad.abs().max()) < 1e-8


def test_geomloss():
    """Its cost is ½‖x − y‖², its ε blur²; its own ε-scaling stops near convergence."""
    geomloss = pytest.importorskip("geomloss")
    x, y, a, b = clouds(30, 40, 2)
    x, y = 0.2 * x, 0.2 * y
    blur = 0.1
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.99, backend="tensorized")
    theirs = float(loss(a, x, b, y))
    ours = weft.sinkhorn_divergence(x, y, a, b, epsilon=2 * blur**2, tolerance=1e-9)
    assert float(ours) / 2 == pytest.approx(theirs, rel=1e-3)


def test_pot():
    """Its regulariser is the entropy: the plan is the same, and so is ⟨P, C⟩."""
    ot = pytest.importorskip("ot")
    x, y, a, b = clouds(20, 25, 2)
    theirs = ot.sinkhorn(a, b, ot.dist(x, y), 0.5, stopThr=1e-12, numItermax=20000)
    r = weft.sinkhorn_points(x, y, a, b, epsilon=0.5, **EXACT)
    torch.testing.assert_close(r.plan, theirs, rtol=1e-7, atol=1e-11)


def test_the_op_chooses():
    """A matrix where it is small, or has many coordinates, and fits; the same results."""
    x, y, a, b = clouds(8, 9, 200, dtype=torch.float32)
    kinds, values = [], []
    for budget in (None, 0):
        r = weft.sinkhorn_points(x, y, a, b, epsilon=50.0, memory_budget=budget)
        kinds.append(type(r).__name__)
        values.append(r.value)
    assert kinds == ["DenseTransport", "PointsTransport"]
    torch.testing.assert_close(*values)


def test_small_epsilon_keeps_its_digits():
    """float32 at ε = 10⁻³ of the costs, by differences and by products."""
    for D, scale in ((2, 1.0), (20, 0.3)):
        x, y, a, b = clouds(60, 70, D)
        x, y = scale * x, scale * y
        options = {"epsilon": 0.01, "max_iterations": 400, "tolerance": -1.0, "memory_budget": 0}
        exact = weft.sinkhorn_points(x, y, a, b, **options)
        single = weft.sinkhorn_points(*(t.float() for t in (x, y, a, b)), **options)
        assert abs(float(single.value - exact.value)) < 1e-5
        assert float((single.plan - exact.plan).abs().max()) < 1e-4


@pytest.mark.parametrize("N, M", [(0, 3), (3, 0), (0, 0)])
def test_empty(N, M):
    x, y = torch.zeros(2, N, 3, requires_grad=True), torch.zeros(2, M, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r = weft.sinkhorn_points(x, y, epsilon=1.0, memory_budget=0)
    assert r.plan.shape == (2, N, M) and r.value.shape == (2,)
    assert r.apply(torch.zeros(2, M, 4)).shape == (2, N, 4)
    assert torch.autograd.grad(r.value.sum(), x)[0].shape == x.shape


def test_unconverged_warns():
    x, y, a, b = clouds()
    with pytest.warns(weft.NotConverged):
        weft.sinkhorn_points(x, y, a, b, epsilon=0.05, max_iterations=2, memory_budget=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weft.sinkhorn_points(x, y, a, b, epsilon=2.0, memory_budget=0)
