"""Pseudo-labels for imbalanced clusters, against the papers' scaling algorithm."""

import pytest
import torch

import weft

MASS, GAMMA = 0.35, 1.0


def scaled(C, mass, epsilon, iterations, v=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The papers' algorithm: scaling of exp(−C / ε) with one more column."""
    n, K = C.shape
    M = torch.exp(-torch.cat([C, C.new_zeros(n, 1)], 1) / epsilon)
    alpha, beta = C.new_full((n,), 1 / n), C.new_full((K + 1,), mass / K)
    beta[-1] = 1 - mass
    v = C.new_ones(K + 1) if v is None else v
    for _ in range(iterations):
        u = alpha / (M @ v)
        v = beta / (M.T @ u)
        v[:-1] = v[:-1] ** (GAMMA / (GAMMA + epsilon))
    return (u[:, None] * M * v)[:, :K], v


def data() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(17, 5, dtype=torch.float64) + torch.tensor([2.0, 1, 0, 0, -1])


@pytest.mark.parametrize("mass", [0.1, MASS, 0.9])
@pytest.mark.parametrize("iterations", [1, 2, 9])
def test_iterates_are_those_of_the_scaling_algorithm(mass, iterations):
    logits = data()
    found = weft.progressive_partial_transport(
        logits, mass, max_iterations=iterations, tolerance=-1.0
    )
    expected, _ = scaled(-logits.log_softmax(1), mass, 0.1, iterations)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_converged():
    logits = data()
    options = {"epsilon": 0.5, "tolerance": 1e-9}
    found = weft.progressive_partial_transport(logits, MASS, **options)
    expected, _ = scaled(-logits.log_softmax(1), MASS, 0.5, 400)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.sum(), torch.tensor(MASS, dtype=torch.float64))
    assert (found.sum(1) <= 1 / 17 + 1e-9).all()
    sizes = found.sum(0)
    assert sizes.max() > 1.5 * sizes.min()  # clusters are not forced to be equal
    all_mass = weft.progressive_partial_transport(logits, 1.0, **options)
    r = weft.sinkhorn(-logits.log_softmax(1), rho=(None, GAMMA), **options)
    torch.testing.assert_close(all_mass, r.plan)


def test_graph_is_majorised():
    """Each outer step is the algorithm on the linearised cost, warm; the objective falls."""
    logits, strength, epsilon = data(), 3.0, 0.5
    points = torch.randn(17, 2, dtype=torch.float64)
    S = (-torch.cdist(points, points).square()).exp().tril()
    C = -logits.log_softmax(1)
    plans, v = [torch.full_like(C, MASS / C.numel())], None
    for _ in range(4):
        Q, v = scaled(C - strength * (S + S.T) @ plans[-1], MASS, epsilon, 20, v)
        plans.append(Q)
    objective, Q = [], plans[0]
    for _ in range(4):
        Q, _ = scaled(C - strength * (S + S.T) @ Q, MASS, epsilon, 2000)
        rest = torch.cat([Q, 1 / 17 - Q.sum(1, keepdim=True)], 1)
        size = Q.sum(0)
        penalty = (size * (size * 5 / MASS).log()).sum()
        value = (Q * C).sum() - strength * (S * (Q @ Q.T)).sum()
        objective.append(float(value + epsilon * (rest * rest.log()).sum() + GAMMA * penalty))
    assert all(later < before for before, later in zip(objective, objective[1:], strict=False))
    for given, count in ((S, 1), (S.to_sparse_coo(), 4), (S.to_sparse_csr(), 2)):
        found = weft.progressive_partial_transport(
            logits,
            MASS,
            epsilon=epsilon,
            graph=given,
            graph_strength=strength,
            max_iterations=20,
            tolerance=-1.0,
            outer_iterations=count,
            outer_tolerance=-1.0,
        )
        torch.testing.assert_close(found, plans[count], rtol=1e-9, atol=1e-13)


def test_outer_steps_end():
    """They end when the plan stays; where a graph joins two samples, their labels come nearer."""
    logits = data()[:6]
    S = torch.zeros(6, 6, dtype=torch.float64)
    S[0, 1] = S[1, 0] = 1.0
    options = {"epsilon": 0.5, "max_iterations": 20, "tolerance": -1.0}
    alone = weft.progressive_partial_transport(logits, 0.9, **options)
    options |= {"graph": S, "graph_strength": 0.5}
    ended = weft.progressive_partial_transport(logits, 0.9, outer_tolerance=1e-5, **options)
    many = weft.progressive_partial_transport(
        logits, 0.9, outer_iterations=15, outer_tolerance=-1.0, **options
    )
    torch.testing.assert_close(ended, many, rtol=1e-3, atol=1e-5)
    assert (ended - alone).abs().max() > 1e-4
    assert (ended[0] * ended[1]).sum() > (alone[0] * alone[1]).sum()


def test_what_has_not_converged_warns():
    with pytest.warns(weft.NotConverged, match="after 2 iterations"):
        weft.progressive_partial_transport(data(), MASS, max_iterations=2)
