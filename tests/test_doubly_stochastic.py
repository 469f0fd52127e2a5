"""Doubly stochastic matrices against the published loops, closed forms, extremes, and processes."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import weft
from weft.ops.cases import randn

FLOAT64 = {"dtype": torch.float64}


def swav(scores, epsilon, iterations):
    """Algorithm 1 of SwAV, Q of shape K x B: rows to 1/K, columns to 1/B; the columns times B."""
    Q = (scores / epsilon).exp().T
    Q = Q / Q.sum()
    K, B = Q.shape
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / B
    return (B * Q).T


def mhc(scores, iterations, eps):
    """Softmax of rows plus eps, columns; then rows and columns."""
    H = scores.softmax(-1) + eps
    H = H / (H.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        H = H / (H.sum(-1, keepdim=True) + eps)
        H = H / (H.sum(-2, keepdim=True) + eps)
    return H


def with_gradient(function, scores):
    scores = scores.detach().clone().requires_grad_()
    result = function(scores)
    upstream = randn(*result.shape, seed=9, dtype=scores.dtype)
    return result.detach(), torch.autograd.grad(result, scores, upstream)[0]


def agree(ours, theirs, scores, **tolerance):
    for one, two in zip(with_gradient(ours, scores), with_gradient(theirs, scores), strict=True):
        torch.testing.assert_close(one, two, **tolerance)


@pytest.mark.parametrize("shape", [(33, 12), (7, 5), (40, 130), (300, 17)])
def test_assignments_are_those_of_swav(shape):
    scores = 0.3 * randn(*shape, **FLOAT64)
    agree(lambda s: weft.doubly_stochastic(s, 3, epsilon=0.05), lambda s: swav(s, 0.05, 3), scores)


@pytest.mark.parametrize("n", [2, 4, 5, 8])
def test_connections_are_those_of_mhc(n):
    scores = 3 * randn(5, n, n, **FLOAT64)
    options = {"last": "columns", "stabilizer": 1e-6}
    agree(lambda s: weft.doubly_stochastic(s, 20, **options), lambda s: mhc(s, 20, 1e-6), scores)


def test_connections_without_a_stabilizer():
    """M <- rows(columns(M)) from exp: 20 times, rows last."""
    scores = randn(6, 4, 4, **FLOAT64)

    def loop(s):
        M = s.exp()
        for _ in range(20):
            M = M / M.sum(-2, keepdim=True)
            M = M / M.sum(-1, keepdim=True)
        return M

    agree(lambda s: weft.doubly_stochastic(s, 20), loop, scores)


@pytest.mark.parametrize("n", [4, 8, 12])
@pytest.mark.parametrize("last", ["rows", "columns"])
def test_doubly_stochastic_stays(n, last):
    """A matrix of which rows and columns sum to 1 is the fixed point, up to scalings of lines."""
    q = sum(torch.eye(n, **FLOAT64)[torch.randperm(n)] for _ in range(5)) / 5 * 0.9 + 0.1 / n
    scaled = randn(n, 1, **FLOAT64) + q.log() + randn(1, n, seed=1, **FLOAT64)
    for scores in (q.log(), scaled):
        iterations = 1 if scores is not scaled else 2000
        found = weft.doubly_stochastic(scores, iterations, last=last)
        torch.testing.assert_close(found, q)


@pytest.mark.parametrize("n", [5, 20])
def test_low_temperature_gives_the_best_permutation(n):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    scores = torch.rand(n, n, generator=torch.Generator().manual_seed(1)) + torch.eye(n)[order]
    found = weft.doubly_stochastic(scores, 500, epsilon=0.002)
    torch.testing.assert_close(found, torch.eye(n)[order], atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(4, 4), (8, 3), (9, 9), (40, 21)])
@pytest.mark.parametrize("last", ["rows", "columns"])
def test_extreme_scores(shape, last):
    """Exponents of ±1e4, and lines far below all others, are those of float64."""
    scores = (randn(*shape) / randn(*shape).abs().max()).sign() * 1e4 + randn(*shape, seed=2)
    scores[1] -= 3e4
    scores[:, 2] += 2e4
    with weft.use("reference"):
        truth, slope = with_gradient(
            lambda s: weft.doubly_stochastic(s, 2, last=last), scores.double()
        )
    found, found_slope = with_gradient(lambda s: weft.doubly_stochastic(s, 2, last=last), scores)
    assert truth.isfinite().all() and slope.isfinite().all()
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_slope.double(), slope, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found.sum(-1 if last == "rows" else -2), torch.ones(shape[0 if last == "rows" else 1])
    )


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 12, 21)])
@pytest.mark.parametrize("last", ["rows", "columns"])
def test_lines_without_entries(implementation, shape, last):
    if implementation == "cpu" and weft.native.missing.get("cpu"):
        pytest.skip("no native library")
    scores = randn(*shape, **FLOAT64)
    scores[0, 1], scores[0, :, 2] = -torch.inf, -torch.inf
    with weft.use(implementation):
        found, slope = with_gradient(
            lambda s: weft.doubly_stochastic(s, 3, last=last, epsilon=0.3), scores
        )
    assert (found[0, 1] == 0).all() and (found[0, :, 2] == 0).all()
    assert slope.isfinite().all() and (slope[0, 1] == 0).all()
    rest = [i for i in range(shape[1]) if i != 1]
    columns = [j for j in range(shape[2]) if j != 2]
    inner = scores[0][rest][:, columns]
    alone = weft.doubly_stochastic(inner, 3, last=last, epsilon=0.3)
    torch.testing.assert_close(found[0][rest][:, columns], alone)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 12, 21)])
@pytest.mark.parametrize("stabilizer", [0.0, 1e-6])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_stays_in_its_matrix(shape, stabilizer, value):
    scores = randn(*shape)
    scores[1, 2, 3] = value
    found, slope = with_gradient(
        lambda s: weft.doubly_stochastic(s, 2, stabilizer=stabilizer), scores
    )
    for result in (found, slope):
        assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("last", ["rows", "columns"])
def test_a_matrix_is_the_same_in_any_batch(last):
    scores = 10 * randn(21, 4, 4)
    all_at_once = weft.doubly_stochastic(scores, 5, last=last)
    for index in (0, 15, 16, 20):
        alone = weft.doubly_stochastic(scores[index], 5, last=last)
        assert torch.equal(alone, all_at_once[index])


def test_group_has_no_gradient():
    with pytest.raises(ValueError, match="no gradient"):
        weft.doubly_stochastic(torch.ones(3, 4, requires_grad=True), 3, group=object())


# ---- samples of two processes ----

RANKS = 2
SIZES = [11, 6]


def of_all():
    scores = 3 * randn(sum(SIZES), 9)
    scores[:, 4] -= 400  # a column that all rows would lose
    scores[12] -= 300
    return scores


def worker(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=RANKS, rank=rank)
    own = of_all().split(SIZES)[rank]
    empty = of_all().split([0, sum(SIZES)])[rank]
    group = dist.group.WORLD
    results[rank] = {
        "shared": weft.doubly_stochastic(own, 3, epsilon=0.2, group=group),
        "one rank has none": weft.doubly_stochastic(empty, 3, epsilon=0.2, group=group),
        "bfloat16": weft.doubly_stochastic(own.bfloat16(), 3, epsilon=0.2, group=group),
    }
    dist.destroy_process_group()


def test_group_is_one_process_with_all_rows():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, results), nprocs=RANKS)
        ranks = [results[rank] for rank in range(RANKS)]
    expected = weft.doubly_stochastic(of_all(), 3, epsilon=0.2)
    for name in ("shared", "one rank has none"):
        found = torch.cat([rank[name] for rank in ranks])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    half = torch.cat([rank["bfloat16"] for rank in ranks])
    expected = weft.doubly_stochastic(of_all().bfloat16(), 3, epsilon=0.2)
    torch.testing.assert_close(half, expected, atol=1e-2, rtol=1e-2)
