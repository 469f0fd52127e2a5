"""The Poincaré ball, against complex numbers and the hyperboloid."""

import copy
import math
import pickle

import pytest
import torch

from weft import ManifoldParameter
from weft.nn import PoincareClassifier, PoincareLinear
from weft.nn import hyperbolic as H
from weft.ops.cases import randn
from weft.optim import RiemannianSGD

CURVATURES = [0.3, 1.0, 2.5]


def ball(*shape, c=1.0, dtype=torch.float64):
    x = randn(*shape, dtype=torch.float64)
    return (
        0.8 * x.norm(dim=-1, keepdim=True).tanh() * x / x.norm(dim=-1, keepdim=True) / c**0.5
    ).to(dtype)


def lift(x, c):
    """Onto the hyperboloid t² − ‖s‖² = 1/c of the Lorentz model, time first."""
    square = c * x.square().sum(-1, keepdim=True)
    return torch.cat([(1 + square) / c**0.5, 2 * x], -1) / (1 - square)


def lower(X, c):
    return X[..., 1:] / (1 + c**0.5 * X[..., :1])


def lorentz(X, Y):
    return (X[..., 1:] * Y[..., 1:]).sum(-1) - X[..., 0] * Y[..., 0]


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("c", CURVATURES)
def test_addition_in_the_plane_is_a_quotient_of_complex_numbers(c):
    x, y = ball(50, 2, c=c), ball(50, 2, c=c).flip(0)
    a, b = torch.view_as_complex(x), torch.view_as_complex(y)
    close(H.mobius_add(x, y, c), torch.view_as_real((a + b) / (1 + c * a.conj() * b)))
    w = randn(50, 2, dtype=torch.float64)
    turn = (1 + c * a * b.conj()) / (1 + c * a.conj() * b)
    close(H.gyration(x, y, w, c), torch.view_as_real(turn * torch.view_as_complex(w)))


@pytest.mark.parametrize("c", CURVATURES)
def test_gyrogroup(c):
    x, y, z = ball(3, 20, 5, c=c)
    close(H.mobius_add(torch.zeros_like(x), x, c), x)
    close(H.mobius_add(-x, x, c), torch.zeros_like(x))
    close(H.mobius_add(-x, H.mobius_add(x, y, c), c), y)
    close(H.mobius_add(x, y, c), H.gyration(x, y, H.mobius_add(y, x, c), c))
    left = H.mobius_add(x, H.mobius_add(y, z, c), c)
    close(left, H.mobius_add(H.mobius_add(x, y, c), H.gyration(x, y, z, c), c))
    close(H.gyration(x, y, z, c).norm(dim=-1), z.norm(dim=-1))


@pytest.mark.parametrize("c", CURVATURES)
def test_distance_is_that_of_the_hyperboloid(c):
    x, y = ball(2, 40, 6, c=c)
    expected = torch.acosh(-c * lorentz(lift(x, c), lift(y, c))) / c**0.5
    close(H.distance(x, y, c), expected)
    close(H.distance(x, y, c), H.distance(y, x, c))
    radius = 2 / c**0.5 * torch.atanh(c**0.5 * x.norm(dim=-1))
    close(H.distance(x, torch.zeros_like(x), c), radius)
    close(2 * H.logmap0(x, c).norm(dim=-1), radius)
    close(H.conformal_factor(x, c)[..., 0] - 1, c**0.5 * lift(x, c)[..., 0])


@pytest.mark.parametrize("c", CURVATURES)
def test_exponential_is_that_of_the_hyperboloid(c):
    x, y = ball(2, 40, 4, c=c)
    v = 0.3 * randn(40, 4, dtype=torch.float64)
    X, V = torch.func.jvp(lambda x: lift(x, c), (x,), (v,))
    speed = lorentz(V, V).sqrt()[:, None] * c**0.5
    close(H.expmap(x, v, c), lower(speed.cosh() * X + speed.sinh() / speed * V, c))
    close(H.logmap(x, H.expmap(x, v, c), c), v, 1e-8)
    close(H.expmap(x, H.logmap(x, y, c), c), y, 1e-8)
    close(H.logmap0(H.expmap0(v, c), c), v)
    length = H.conformal_factor(x, c)[:, 0] * H.logmap(x, y, c).norm(dim=-1)
    close(length, H.distance(x, y, c))


@pytest.mark.parametrize("c", CURVATURES)
def test_transport_is_that_of_the_hyperboloid(c):
    x, y = ball(2, 40, 4, c=c)
    v = randn(40, 4, dtype=torch.float64)
    X, V = torch.func.jvp(lambda x: lift(x, c), (x,), (v,))
    Y = lift(y, c)
    carried = V + (lorentz(Y, V) * c / (1 - c * lorentz(X, Y)))[:, None] * (X + Y)
    moved = torch.func.jvp(lambda Y: lower(Y, c), (Y,), (carried,))[1]
    close(H.parallel_transport(x, y, v, c), moved)


@pytest.mark.parametrize("c", CURVATURES)
def test_midpoint_is_the_sum_on_the_hyperboloid(c):
    x, weights = ball(7, 5, 3, c=c), torch.rand(7, 5, dtype=torch.float64)
    for w in (None, weights):
        total = (lift(x, c) * (1 if w is None else w[..., None])).sum(-2)
        total = total / (-c * lorentz(total, total)).sqrt()[:, None]
        close(H.midpoint(x, w, c), lower(total, c))
    m = H.midpoint(x[:, :2], c=c)
    close(H.distance(m, x[:, 0], c), H.distance(m, x[:, 1], c))


def test_flat_limit():
    x, y, c = *(0.1 * randn(2, 20, 3, dtype=torch.float64)), 1e-9
    close(H.mobius_add(x, y, c), x + y, 1e-8)
    close(H.expmap(x, y, c), x + y, 1e-8)
    close(H.logmap(x, y, c), y - x, 1e-8)
    close(H.distance(x, y, c), 2 * (x - y).norm(dim=-1), 1e-8)
    close(H.midpoint(x, c=c), x.mean(0), 1e-8)


FUNCTIONS = [
    lambda x, y, c: H.mobius_add(x, y, c),
    lambda x, y, c: H.gyration(x, y, x + y, c),
    lambda x, y, c: H.expmap0(x, c),
    lambda x, y, c: H.logmap0(x, c),
    lambda x, y, c: H.expmap(x, y, c),
    lambda x, y, c: H.logmap(x, y, c),
    lambda x, y, c: H.parallel_transport(x, y, x - y, c),
    lambda x, y, c: H.distance(x, y, c),
    lambda x, y, c: H.conformal_factor(x, c),
    lambda x, y, c: H.midpoint(x, c=c),
    lambda x, y, c: H.project(x, c, margin=0.6),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_also_by_curvature(function):
    x, y = ball(2, 4, 3, c=1.3)
    c = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    leaves = (x.requires_grad_(), y.requires_grad_(), c)
    x, y = (leaf.detach().clone().requires_grad_() for leaf in leaves[:2])
    assert torch.autograd.gradcheck(function, (x, y, c))
    assert torch.autograd.gradgradcheck(function, (x, y, c))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_at_the_origin_and_at_equal_points_are_finite(function):
    for x in (torch.zeros(2, 3), torch.full((2, 3), 0.2), torch.full((2, 3), 1e-25)):
        x, y, c = x.requires_grad_(), x.detach().clone().requires_grad_(), torch.tensor(1.0)
        c.requires_grad_()
        first = torch.autograd.grad(
            function(x, y, c).sum(), (x, y, c), create_graph=True, materialize_grads=True
        )
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), (x, y, c), materialize_grads=True
        )
        assert all(g.isfinite().all() for g in (*first, *second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_near_the_boundary_all_is_finite(function, dtype):
    x = H.project(100 * randn(30, 4), 1.0).to(dtype)
    x = H.project(x, 1.0).requires_grad_()
    y = (-x.detach().roll(1, 0)).requires_grad_()
    out = function(x, y, 1.0)
    out.float().sum().backward()
    assert out.dtype == dtype and out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_projection(dtype):
    x = randn(50, 6).to(dtype) * torch.logspace(-3, 3, 50)[:, None].to(dtype)
    p = H.project(x, 0.7)
    assert (0.7 * p.double().square().sum(-1)).max() < 1
    inside = (0.7**0.5 * x.double().norm(dim=-1)) < 0.9
    assert inside.any() and torch.equal(p[inside], x[inside])


# ---- layers -------------------------------------------------------------------------------------


def plane_distance(x, z, r, c):
    """To the hyperplane through exp0(r z/‖z‖) across z: by its normal on the hyperboloid.

    It is asinh(√c⟨X, N⟩)/√c for a unit normal N.
    """
    unit = z / z.norm(dim=-1, keepdim=True)
    angle = 2 * c**0.5 * r[:, None]
    N = torch.cat([angle.sinh(), angle.cosh() * unit], -1)
    return torch.asinh(c**0.5 * lorentz(lift(x, c)[:, None], N)) / c**0.5


@pytest.mark.parametrize("c", CURVATURES)
def test_classifier_measures_distances_to_hyperplanes(c):
    head = PoincareClassifier(4, 3, curvature=c, dtype=torch.float64)
    torch.nn.init.normal_(head.bias, std=0.3)
    x, z, r = ball(20, 4, c=c), head.weight.detach(), head.bias.detach()
    close(head(x).detach(), 2 * z.norm(dim=-1) * plane_distance(x, z, r, c))
    on_plane = H.expmap0(r[:, None] * z / z.norm(dim=-1, keepdim=True), c)
    close(head(on_plane).diagonal().detach(), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("c", CURVATURES)
def test_linear_puts_scores_on_the_axes(c):
    layer = PoincareLinear(4, 3, curvature=c, dtype=torch.float64)
    torch.nn.init.normal_(layer.bias, std=0.3)
    x = ball(20, 4, c=c)
    y = layer(x).detach()
    axes, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    scores = PoincareClassifier.forward(layer, x).detach()
    close(plane_distance(y, axes, zero, c), scores, 1e-8)


@pytest.mark.parametrize("kind", [PoincareClassifier, PoincareLinear])
def test_layer_derivatives_and_shapes(kind):
    layer = kind(3, 2, curvature=0.8, learn_curvature=True, dtype=torch.float64)
    x = ball(2, 3, 3, c=0.8).requires_grad_()

    def run(x, *values):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert len(leaves) == 3 and run(x, *leaves).shape == (2, 3, 2)
    assert torch.autograd.gradcheck(run, (x, *leaves))
    assert torch.autograd.gradgradcheck(run, (x, *leaves))
    plain = kind(3, 2, bias=False)
    with torch.no_grad():
        plain.weight[0] = 0
    out = plain(H.project(1e3 * randn(5, 3)))
    out.sum().backward()
    assert out.isfinite().all() and plain.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "c must be finite", lambda: H.expmap0(torch.ones(2), 0.0)),
        (ValueError, "c must be one", lambda: H.expmap0(torch.ones(2), torch.ones(2))),
        (
            TypeError,
            "y must be a floating",
            lambda: H.distance(torch.ones(2), torch.tensor([1, 2])),
        ),
        (ValueError, "one last dimension", lambda: H.distance(torch.ones(2), torch.ones(3))),
        (ValueError, r"\(\.\.\., N, D\)", lambda: H.midpoint(torch.ones(3))),
        (ValueError, "weights must be", lambda: H.midpoint(torch.ones(3, 2), torch.ones(2))),
        (ValueError, "margin must be", lambda: H.project(torch.ones(2), 1.0, 0.0)),
        (ValueError, "num_classes must be", lambda: PoincareLinear(3, 0)),
        (ValueError, "x must be", lambda: PoincareLinear(3, 2)(torch.ones(2, 4))),
        (
            ValueError,
            "curvature must be",
            lambda: ManifoldParameter(torch.zeros(2), "poincare", curvature=-1.0),
        ),
    ],
)
def test_refuses(error, match, call):
    with pytest.raises(error, match=match):
        call()


# ---- the optimizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_geodesics_of_the_hyperboloid(momentum):
    c, lr = 0.7, 0.05
    start, target = ball(2, 6, 3, c=c)
    p = ManifoldParameter(start.clone(), "poincare", curvature=c)
    optimizer = RiemannianSGD([p], lr=lr, momentum=momentum, dampening=0.1)
    X, buffer = lift(start, c), None
    for _ in range(12):
        optimizer.zero_grad()
        H.distance(p, target, c).square().sum().backward()
        optimizer.step()
        # on the hyperboloid the gradient of d² is −2 log_X(T)
        T = lift(target, c)
        inner = -c * lorentz(X, T)[:, None]
        grad = -2 * torch.acosh(inner) / (inner.square() - 1).sqrt() * (T - inner * X)
        buffer = grad if buffer is None else momentum * buffer + 0.9 * grad
        V = -lr * buffer if momentum else -lr * grad
        speed = (c * lorentz(V, V)).sqrt()[:, None]
        Y = speed.cosh() * X + speed.sinh() / speed * V
        buffer = buffer + (c * lorentz(Y, buffer) / (1 - c * lorentz(X, Y)))[:, None] * (X + Y)
        X = Y
    close(p.detach(), lower(X, c), 1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_stay_inside_and_converge(momentum, dtype):
    points = ball(1, 8, 3, dtype=dtype)
    p = ManifoldParameter(torch.zeros(1, 3, dtype=dtype), "poincare")
    optimizer = RiemannianSGD([p], lr=0.02, momentum=momentum)
    for _ in range(150):
        optimizer.zero_grad()
        loss = H.distance(p[:, None].float(), points.float()).square().mean()
        loss.backward()
        optimizer.step()
    if dtype == torch.float32:  # at the Fréchet mean the logarithms add to 0
        mean = H.logmap(p.detach()[:, None], points).mean(1)
        assert mean.norm() < 1e-2
    away = ManifoldParameter(points[0].clone(), "poincare")
    optimizer = RiemannianSGD([away], lr=10.0, momentum=momentum)
    for _ in range(30):
        optimizer.zero_grad()
        (-H.distance(away, torch.zeros_like(away)).sum()).backward()
        optimizer.step()
        assert away.detach().double().norm(dim=-1).max() < 1


def test_parameter_keeps_its_curvature():
    p = ManifoldParameter(torch.zeros(4, 2), "poincare", curvature=0.4)
    for twin in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert twin.kind == "poincare" and math.isclose(twin.curvature, 0.4)
