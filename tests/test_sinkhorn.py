"""Transport with a matrix of costs: closed forms, POT, and what its results promise."""

import numpy as np
import pytest
import torch

import weft
from weft.ops.registration import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole solutions are not for an interpreter")


def points_cost(n: int = 512, dtype=torch.float64) -> torch.Tensor:
    """Squared distances between uniform points in the unit square."""
    random = np.random.RandomState(0)
    x, y = torch.tensor(random.rand(n, 2)), torch.tensor(random.rand(n, 2))
    return (x[:, None] - y).square().sum(-1).to(dtype)


def random_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*shape, dtype=torch.float64, generator=generator) + 0.1
    return weights / weights.sum(-1, keepdim=True)


# ⟨P, C⟩ of 512 uniform points by a stabilised solver in float64; that of the exact plan is
# 0.0034303.
KNOWN = {1e-1: 0.078950, 1e-2: 0.0115034, 1e-3: 0.0039509}


@pytest.mark.parametrize("epsilon", KNOWN)
def test_accuracy_of_float32(epsilon):
    """At tolerance 1e-6: marginals to 1e-5, the plan to 1e-6."""
    C = points_cost()
    exact = weft.sinkhorn(C, epsilon=epsilon, tolerance=1e-10)
    found = weft.sinkhorn(C.float(), epsilon=epsilon, tolerance=1e-6)
    assert bool(found.converged)
    assert abs(float((exact.plan * C).sum()) - KNOWN[epsilon]) < 5e-7 * (1 + 100 * epsilon)
    assert int(found.iterations) <= 700 and int(exact.iterations) <= 700
    P = found.plan.double()
    for dim in (0, 1):
        assert (P.sum(dim) - 1 / 512).abs().sum() < 1e-5
    assert (P - exact.plan).abs().max() < 1e-6
    assert abs(float(found.value) - float(exact.value)) < 1e-5


def test_dirac_and_permutation():
    one = weft.sinkhorn(
        torch.tensor([[3.0, 5.0]]), torch.ones(1), torch.tensor([0.25, 0.75]), epsilon=0.5
    )
    torch.testing.assert_close(one.plan, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(one.value, torch.tensor(4.5))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    C = 1 - torch.eye(9, dtype=torch.float64)[order]
    P = weft.sinkhorn(C, epsilon=0.01).plan
    torch.testing.assert_close(9 * P, torch.eye(9, dtype=torch.float64)[order])


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_gaussians(variance):
    """Entropic transport between Gaussians on a grid: mean and covariance of the plan are known.

    Source: Janati et al., "Entropic Optimal Transport between Unbalanced Gaussian Measures has a
    Closed Form", NeurIPS 2020, theorem 1."""
    grid = torch.linspace(-10, 10, 401, dtype=torch.float64)
    density = lambda v: torch.softmax(-grid.square() / (2 * v), 0)  # noqa: E731
    epsilon = 0.5
    P = weft.sinkhorn(
        (grid[:, None] - grid).square(),
        density(1.0),
        density(variance),
        epsilon=epsilon,
        tolerance=1e-10,
    ).plan
    covariance = (P * grid[:, None] * grid).sum()
    half = epsilon / 4
    expected = (variance + half**2) ** 0.5 - half
    assert abs(float(covariance) - expected) < 1e-6


@pytest.mark.parametrize("options", [{}, {"rho": 0.7}, {"rho": (None, 0.3)}], ids=str)
def test_against_pot(options):
    ot = pytest.importorskip("ot")
    C, a, b = points_cost(40), random_weights(40), random_weights(40, seed=1)
    found = weft.sinkhorn(C, a, b, epsilon=0.1, tolerance=1e-12, **options)
    if not options:
        expected = ot.sinkhorn(a.numpy(), b.numpy(), C.numpy(), 0.1, stopThr=1e-13)
    else:
        rho = options["rho"] if isinstance(options["rho"], tuple) else (options["rho"],) * 2
        rho = tuple(np.inf if r is None else r for r in rho)
        expected = ot.unbalanced.sinkhorn_unbalanced(
            a.numpy(), b.numpy(), C.numpy(), 0.1, rho, reg_type="kl", stopThr=1e-13, numItermax=5000
        )
    np.testing.assert_allclose(found.plan.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_partial_against_pot():
    ot = pytest.importorskip("ot")
    C, a, b = points_cost(20), random_weights(20), random_weights(20, seed=1)
    found = weft.sinkhorn(C, a, b, mass=0.6, epsilon=0.005, tolerance=1e-9, max_iterations=5000)
    assert abs(float(found.plan.sum()) - 0.6) < 1e-6
    exact = ot.partial.partial_wasserstein(a.numpy(), b.numpy(), C.numpy(), m=0.6)
    assert (exact * C.numpy()).sum() <= float((found.plan * C).sum()) + 1e-9
    assert float((found.plan * C).sum()) < (exact * C.numpy()).sum() + 0.01


def test_value_is_the_primal_objective():
    def kl(p, q):
        return (torch.xlogy(p, p / q) - p + q).sum((-2, -1) if p.dim() == 3 else -1)

    C = torch.rand(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = random_weights(2, 6), 1.3 * random_weights(2, 8, seed=1)
    found = weft.sinkhorn(C, a, b, epsilon=0.2, rho=(0.8, 1.5), tolerance=1e-12)
    P = found.plan
    primal = (P * C).sum((1, 2)) + 0.2 * kl(P, a[:, :, None] * b[:, None])
    primal = primal + 0.8 * kl(P.sum(2), a) + 1.5 * kl(P.sum(1), b)
    torch.testing.assert_close(found.value, primal)


def test_implicit_is_the_limit_of_unrolled():
    C = torch.rand(1, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(
        1, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    grads = []
    for options in (dict(tolerance=1e-12), dict(gradient="unrolled", max_iterations=5000)):
        leaf = C.clone().requires_grad_()
        (weft.sinkhorn(leaf, epsilon=0.02, **options).plan * upstream).sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()


def test_padding_and_masks_are_never_read():
    generator = torch.Generator().manual_seed(0)
    C = torch.rand(2, 9, 11, generator=generator)
    lengths = torch.tensor([9, 5]), torch.tensor([7, 11])
    padded = C.clone()
    padded[0, :, 7:] = torch.nan
    padded[1, 5:] = torch.nan
    together = weft.sinkhorn(padded.requires_grad_(), epsilon=0.1, lengths=lengths)
    (together.plan.nan_to_num(7) ** 2).sum().backward()
    for n, (rows, columns) in enumerate(zip(*lengths, strict=True)):
        leaf = C[n, :rows, :columns].clone().requires_grad_()
        alone = weft.sinkhorn(leaf, epsilon=0.1)
        assert torch.equal(alone.value, together.value[n])
        assert torch.equal(alone.plan, together.plan[n, :rows, :columns])
        (alone.plan**2).sum().backward()
        assert torch.equal(leaf.grad, padded.grad[n, :rows, :columns])
    assert not padded.grad.isnan().any()
    assert together.plan[1, 5:].eq(0).all() and together.plan[0, :, 7:].eq(0).all()


def test_zero_weights():
    """Points of no weight move nothing, have potentials, and finite gradients."""
    C = points_cost(12)
    a = random_weights(12)
    a[3] = 0
    a = (a / a.sum()).requires_grad_()
    leaf = C.clone().requires_grad_()
    found = weft.sinkhorn(leaf, a, epsilon=0.1, tolerance=1e-12)
    keep = torch.arange(12) != 3
    without = weft.sinkhorn(C[keep], a.detach()[keep], epsilon=0.1, tolerance=1e-12)
    torch.testing.assert_close(found.plan[keep], without.plan)
    assert found.plan[3].eq(0).all() and found.potentials[0].isfinite().all()
    (found.plan.square().sum() + found.value).backward()
    assert leaf.grad.isfinite().all() and a.grad.isfinite().all() and leaf.grad[3].eq(0).all()


def test_row_without_a_pair():
    C = points_cost(5)
    C[2] = torch.inf
    with pytest.warns(weft.NotConverged):
        found = weft.sinkhorn(C, epsilon=0.1, max_iterations=30)
    f, _ = found.potentials
    assert f[2] == -torch.inf and found.plan[2].eq(0).all() and found.plan.isfinite().all()
    assert found.value.isfinite() and found.marginal_error >= 0.2


def test_far_points_of_unbalanced_problems_converge():
    """Translation of all points changes nothing, and the shift of potentials keeps it fast."""
    C = points_cost(30)
    near = weft.sinkhorn(C, epsilon=0.05, rho=100.0, tolerance=1e-9)
    assert bool(near.converged) and int(near.iterations) < 300
    a, b = random_weights(30), 3 * random_weights(30, seed=1)
    apart = weft.sinkhorn(C, a, b, epsilon=0.05, rho=100.0, tolerance=1e-9)
    assert bool(apart.converged) and int(apart.iterations) < 300


def test_annealing_and_warm_start():
    C = points_cost(60)
    plain = weft.sinkhorn(C, epsilon=1e-2, tolerance=1e-9)
    annealed = weft.sinkhorn(C, epsilon=1e-2, tolerance=1e-9, schedule="anneal")
    torch.testing.assert_close(annealed.plan, plain.plan, rtol=0, atol=1e-9)
    again = weft.sinkhorn(C, epsilon=1e-2, tolerance=1e-9, potentials=plain.potentials)
    assert int(again.iterations) <= 2
    torch.testing.assert_close(again.plan, plain.plan, rtol=0, atol=1e-9)


def test_acceleration_changes_nothing_but_the_count():
    C = points_cost(100)
    fast = weft.sinkhorn(C, epsilon=1e-2, tolerance=1e-8, max_iterations=9000)
    slow = weft.sinkhorn(C, epsilon=1e-2, tolerance=1e-8, max_iterations=9000, acceleration="none")
    assert 3 * int(fast.iterations) < int(slow.iterations)
    torch.testing.assert_close(fast.plan, slow.plan, rtol=0, atol=1e-9)


def test_each_problem_stops_by_itself():
    C = points_cost(20)
    found = weft.sinkhorn(torch.stack([C, C]), epsilon=torch.tensor([1.0, 0.02], dtype=C.dtype))
    alone = [weft.sinkhorn(C, epsilon=e) for e in (1.0, 0.02)]
    for n, one in enumerate(alone):
        assert found.iterations[n] == one.iterations
        assert torch.equal(found.plan[n], one.plan)


def test_non_convergence_is_reported():
    with pytest.warns(weft.NotConverged, match="marginal error"):
        found = weft.sinkhorn(points_cost(20), epsilon=1e-3, max_iterations=3)
    with pytest.warns(weft.NotConverged):
        assert not bool(found.converged)


def test_label_joint_and_apply():
    found = weft.sinkhorn(points_cost(10)[:, :8], epsilon=0.1)
    rows, columns = torch.arange(10) % 3, torch.arange(8) % 2
    joint = found.plan_label_joint(rows, columns, 3, 2)
    by_hand = torch.zeros(3, 2, dtype=torch.float64)
    for i in range(10):
        for j in range(8):
            by_hand[rows[i], columns[j]] += found.plan[i, j]
    torch.testing.assert_close(joint, by_hand)
    values = torch.rand(8, 4, dtype=torch.float64)
    torch.testing.assert_close(found.apply(values), found.plan @ values)
