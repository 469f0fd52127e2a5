"""Potentials of POT, OTT and GeomLoss become ours, and their plans are the same."""

import numpy as np
import pytest
import torch

import weft
from weft import transport
from weft.ops.registration import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole solutions are not for an interpreter")
EPSILON = 0.1


def problem():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    x, y, a, b = draw(12, 2), draw(9, 2), draw(12) + 0.2, draw(9) + 0.2
    return x, y, a / a.sum(), b / b.sum()


def same_up_to_a_constant(f, g, found, tolerance=1e-8):
    """Balanced potentials are defined up to f + c, g − c."""
    difference = f - found.potentials[0]
    assert float(difference.max() - difference.min()) < tolerance
    torch.testing.assert_close(g + difference.mean(), found.potentials[1], rtol=0, atol=tolerance)


def solved(x, y, a, b):
    return weft.sinkhorn(weft.pairwise_distance(x, y), a, b, epsilon=EPSILON, tolerance=1e-12)


def test_pot():
    ot = pytest.importorskip("ot")
    x, y, a, b = problem()
    _, log = ot.sinkhorn(
        a.numpy(), b.numpy(), ot.dist(x.numpy(), y.numpy()), EPSILON, stopThr=1e-14, log=True
    )
    log_u, log_v = (torch.tensor(np.log(log[name])) for name in "uv")
    found = solved(x, y, a, b)
    f, g = transport.from_pot(log_u, log_v, a, b, EPSILON)
    same_up_to_a_constant(f, g, found)
    for one, two in zip(transport.to_pot(f, g, a, b, EPSILON), (log_u, log_v), strict=True):
        torch.testing.assert_close(one, two)


def test_ott():
    jax = pytest.importorskip("jax")
    pytest.importorskip("ott")
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    x, y, a, b = problem()
    arrays = [jax.numpy.asarray(t.float().numpy()) for t in (x, y, a, b)]
    geometry = PointCloud(*arrays[:2], epsilon=EPSILON)
    theirs = Sinkhorn(threshold=1e-6)(LinearProblem(geometry, *arrays[2:]))
    f, g = (torch.tensor(np.asarray(p)).double() for p in (theirs.f, theirs.g))
    found = solved(x, y, a, b)
    same_up_to_a_constant(*transport.from_ott(f, g, a, b, EPSILON), found, tolerance=1e-4)
    back = transport.to_ott(*transport.from_ott(f, g, a, b, EPSILON), a, b, EPSILON)
    torch.testing.assert_close(back, (f, g))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.6])
def test_geomloss(p, reach):
    geomloss = pytest.importorskip("geomloss")
    x, y, a, b = problem()
    blur = transport.to_geomloss(EPSILON, p=p)[0]
    options = dict(p=p, blur=blur, reach=reach, debias=False, scaling=0.98, backend="tensorized")
    F, G = geomloss.SamplesLoss("sinkhorn", potentials=True, **options)(a, x, b, y)
    ours = transport.from_geomloss(blur, reach, p)
    assert abs(ours.epsilon - EPSILON) < 1e-12
    assert ours.rho is None or abs(transport.to_geomloss(EPSILON, ours.rho, p)[1] - reach) < 1e-12
    # Its schedule stops before the optimum: from there on to it, in its convention.
    distance = torch.cdist(x, y)
    C, eps = distance if p == 1 else distance.square() / 2, blur**p
    damping = 1.0 if reach is None else 1 / (1 + eps / reach**p)
    F, G = F.flatten(), G.flatten()
    near = p * F
    for _ in range(300):
        F = -damping * eps * torch.logsumexp(b.log() + (G - C) / eps, 1)
        G = -damping * eps * torch.logsumexp(a.log() + (F - C.mT) / eps, 1)
    metric = {1: "euclidean", 2: "sqeuclidean"}[p]
    costs = weft.pairwise_distance(x, y, metric)
    found = weft.sinkhorn(costs, a, b, epsilon=ours.epsilon, rho=ours.rho, tolerance=1e-12)
    f, g = transport.potentials_of_geomloss(F, G, p)
    assert float((near - f).std()) < 0.05 * float(f.std())
    if reach is None:
        same_up_to_a_constant(f, g, found, tolerance=1e-6)
        value = ours.factor * float((a * F).sum() + (b * G).sum())
        assert abs(value - float(found.value)) < 1e-6
    else:
        torch.testing.assert_close(f, found.potentials[0], rtol=0, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="p must be"):
        transport.from_geomloss(0.1, p=3)
    with pytest.raises(ValueError, match="blur must be"):
        transport.from_geomloss(0.0)
