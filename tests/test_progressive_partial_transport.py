"""Pseudo-labels for imbalanced clusters, against the scaling algorithm and against conditions of
optimality."""

import pytest
import torch

import weft

MASS, EPSILON, GAMMA = 0.35, 0.1, 1.0


def scaled(C: torch.Tensor, mass: float, epsilon: float, gamma: float) -> torch.Tensor:
    """The papers' algorithm: scaling of exp(−C / ε) with one more column, to convergence."""
    n, K = C.shape
    M = torch.exp(-torch.cat([C, C.new_zeros(n, 1)], 1) / epsilon)
    alpha, beta = C.new_full((n,), 1 / n), C.new_full((K + 1,), mass / K)
    beta[-1] = 1 - mass
    v = C.new_full((K + 1,), 1 / (K + 1))
    for _ in range(400):
        u = alpha / (M @ v)
        v = beta / (M.T @ u)
        v[:-1] = v[:-1] ** (gamma / (gamma + epsilon))
    return (u[:, None] * M * v)[:, :K]


def data() -> torch.Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(17, 5, dtype=torch.float64) + torch.tensor([2.0, 1, 0, 0, -1])


@pytest.mark.parametrize("mass", [0.1, MASS, 0.9])
def test_is_the_scaling_algorithm(mass):
    logits = data()
    found = weft.progressive_partial_transport(logits, mass, tolerance=1e-11)
    expected = scaled(-logits.log_softmax(1), mass, EPSILON, GAMMA)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-11)
    torch.testing.assert_close(found.sum(), torch.tensor(mass, dtype=torch.float64))
    assert (found.sum(1) <= 1 / 17 + 1e-12).all()
    sizes = found.sum(0) / mass
    assert sizes.max() > 2 * sizes.min()  # clusters are not forced to be equal


def test_all_mass_is_a_semi_relaxed_problem():
    logits = data()
    found = weft.progressive_partial_transport(logits, 1.0, tolerance=1e-10)
    C = -logits.log_softmax(1)
    r = weft.sinkhorn(C, epsilon=EPSILON, rho=(None, GAMMA), tolerance=1e-10)
    torch.testing.assert_close(found, r.plan)


def test_graph_is_majorised():
    """Each outer step is the algorithm on the linearised cost; the objective falls."""
    logits, strength = data(), 3.0
    points = torch.randn(17, 2, dtype=torch.float64)
    S = (-torch.cdist(points, points).square()).exp().tril()
    C = -logits.log_softmax(1)
    plans, objective = [torch.full_like(C, MASS / C.numel())], []
    for _ in range(4):
        Q = scaled(C - strength * (S + S.T) @ plans[-1], MASS, EPSILON, GAMMA)
        rest = torch.cat([Q, 1 / 17 - Q.sum(1, keepdim=True)], 1)
        size = Q.sum(0)
        penalty = (size * (size * 5 / MASS).log()).sum()
        value = (Q * C).sum() - strength * (S * (Q @ Q.T)).sum()
        objective.append(float(value + EPSILON * (rest * rest.log()).sum() + GAMMA * penalty))
        plans.append(Q)
    assert all(later < before for before, later in zip(objective, objective[1:], strict=False))
    for given, count in ((S, 1), (S.to_sparse_coo(), 4), (S.to_sparse_csr(), 2)):
        found = weft.progressive_partial_transport(
            logits,
            MASS,
            graph=given,
            graph_strength=strength,
            tolerance=1e-10,
            outer_iterations=count,
            outer_tolerance=-1.0,
        )
        torch.testing.assert_close(found, plans[count], rtol=1e-6, atol=1e-10)
