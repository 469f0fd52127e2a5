"""Matching with a dustbin, against loops over single entries."""

import math

import pytest
import torch
from contract import Call, watch

import weft
from weft.ops.transport.cases.log_optimal_transport import LOG_OPTIMAL_TRANSPORT


def by_hand(scores: list[list[float]], bin_score: float, iterations: int) -> list[list[float]]:
    """The paper's iterations in plain Python."""
    m, n = len(scores), len(scores[0])
    S = [[*row, bin_score] for row in scores] + [[bin_score] * (n + 1)]
    mu = [1 / (m + n)] * m + [n / (m + n)]
    nu = [1 / (m + n)] * n + [m / (m + n)]
    u, v = [0.0] * (m + 1), [0.0] * (n + 1)
    for _ in range(iterations):
        for i in range(m + 1):
            u[i] = math.log(mu[i]) - math.log(sum(math.exp(S[i][j] + v[j]) for j in range(n + 1)))
        for j in range(n + 1):
            v[j] = math.log(nu[j]) - math.log(sum(math.exp(S[i][j] + u[i]) for i in range(m + 1)))
    return [[S[i][j] + u[i] + v[j] + math.log(m + n) for j in range(n + 1)] for i in range(m + 1)]


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_is_the_papers_loop(iterations):
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 4, dtype=torch.float64)
    bins = torch.randn(2, dtype=torch.float64)
    found = weft.log_optimal_transport(scores, bins, iterations)
    for n in range(2):
        expected = by_hand(scores[n].tolist(), float(bins[n]), iterations)
        torch.testing.assert_close(found[n], torch.tensor(expected, dtype=torch.float64))
        one = weft.log_optimal_transport(scores[n], bins[n], iterations)
        torch.testing.assert_close(one, found[n])
    columns = found.exp().sum(1)
    torch.testing.assert_close(columns[:, :-1], torch.ones_like(columns[:, :-1]))
    torch.testing.assert_close(columns[:, -1], torch.full_like(bins, 3.0))


def test_padding_changes_nothing():
    torch.manual_seed(0)
    scores = torch.randn(3, 6, 5, dtype=torch.float64)
    rows, columns = torch.tensor([4, 6, 0]), torch.tensor([5, 2, 3])
    padded = scores.clone()
    for n in range(3):
        padded[n, rows[n] :], padded[n, :, columns[n] :] = torch.nan, torch.nan
    padded.requires_grad_()
    bins = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = weft.log_optimal_transport(padded, bins, 5, lengths=(rows, columns))
    total = 0
    for n in range(3):
        m, k = int(rows[n]), int(columns[n])
        real = [*range(m), 6], [*range(k), 5]
        one = weft.log_optimal_transport(scores[n, :m, :k], bins, 5)
        torch.testing.assert_close(found[n][real[0]][:, real[1]], one)
        beyond = torch.ones(7, 6, dtype=torch.bool)
        beyond[torch.tensor(real[0])[:, None], torch.tensor(real[1])] = False
        assert (found[n][beyond] == -torch.inf).all()
        total = total + torch.where(one.isfinite(), one, 0).square().sum()
    (expected,) = torch.autograd.grad(total, [bins])
    squares = torch.where(found.isfinite(), found, 0).square().sum()
    grad_scores, grad_bins = torch.autograd.grad(squares, [padded, bins])
    torch.testing.assert_close(grad_bins, expected)
    assert (grad_scores[padded.isnan()] == 0).all() and grad_scores.isfinite().all()


def test_forbidden_pairs_and_one_sided_problems():
    scores = torch.zeros(2, 2)
    scores[0, 0] = -torch.inf
    found = weft.log_optimal_transport(scores, 0.0, 50)
    assert found[0, 0] == -torch.inf and found[0, 1] > found[1, 1]
    only_bins = weft.log_optimal_transport(torch.zeros(3, 0), 1.0, 4)
    torch.testing.assert_close(only_bins[:, 0], torch.tensor([0.0, 0, 0, -torch.inf]))


def test_scores_are_read_where_they_are():
    """The op gets the caller's scores, not a matrix with dustbins."""
    call = Call(LOG_OPTIMAL_TRANSPORT, LOG_OPTIMAL_TRANSPORT.samples[0], torch.float32)
    with watch() as log:
        call()
    assert [op for op, *_ in log] == ["sinkhorn", "transport_plan"]
    assert all(args[0].data_ptr() == call.args[0].data_ptr() for *_, args in log)
