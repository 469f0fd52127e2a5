"""VectorQuantizer against the published updates, written with one-hot products in float64."""

import copy
import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from weft.nn import VectorQuantizer
from weft.ops.cases import randn


def published_step(z, codebook, count, total, decay, eps):
    """Appendix A.1 with Laplace smoothing: one-hot products."""
    indices = (z[:, None] - codebook).square().sum(-1).argmin(1)
    one_hot = torch.eye(len(codebook), dtype=z.dtype)[indices]
    count = decay * count + (1 - decay) * one_hot.sum(0)
    total = decay * total + (1 - decay) * one_hot.T @ z
    n = count.sum()
    smoothed = (count + eps) / (n + len(codebook) * eps) * n
    return indices, total / smoothed[:, None], count, total


@pytest.mark.parametrize("shape", [(40, 3), (2, 5, 4, 3), (3,)])
def test_moving_averages_are_the_published_ones(shape):
    layer = VectorQuantizer(7, 3, decay=0.8, eps=1e-3, dtype=torch.float64)
    codebook, count, total = layer.codebook.clone(), torch.ones(7).double(), layer.codebook.clone()
    for step in range(5):
        z = randn(*shape, dtype=torch.float64, seed=step)
        before = codebook
        indices, codebook, count, total = published_step(
            z.reshape(-1, 3), codebook, count, total, 0.8, 1e-3
        )
        own = layer.codebook.clone()
        result = layer(z)
        assert torch.equal(result.indices.reshape(-1), indices)
        assert torch.equal(result.values, own[indices].view(shape))
        torch.testing.assert_close(own, before)
        torch.testing.assert_close(result.loss, 0.25 * (z - result.values).square().mean())
        share = torch.bincount(indices, minlength=7) / len(indices)
        entropy = -sum(p * math.log(p) for p in share.tolist() if p)
        torch.testing.assert_close(result.perplexity.item(), math.exp(entropy), rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.codebook, codebook)
        torch.testing.assert_close(layer.count, count)
        torch.testing.assert_close(layer.total, total)
    assert torch.equal(layer.decode(indices.view(shape[:-1])), layer.codebook[indices].view(shape))


def test_gradients_pass_straight_through():
    layer = VectorQuantizer(7, 3, commitment=0.5).eval()
    z = randn(10, 3).requires_grad_()
    upstream = randn(10, 3, seed=1)
    result = layer(z)
    (result.values * upstream).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, upstream)
    z.grad = None
    result.loss.backward()
    torch.testing.assert_close(z.grad, 0.5 * 2 * (z - result.values).detach() / z.numel())


def test_a_codebook_learned_by_gradients():
    layer = VectorQuantizer(7, 3, decay=None, commitment=0.5)
    z = randn(10, 3).requires_grad_()
    result = layer(z)
    difference = (z - layer.codebook[result.indices]).detach()
    torch.testing.assert_close(result.loss.detach(), 1.5 * difference.square().mean())
    result.loss.backward()
    torch.testing.assert_close(z.grad, difference / 30)
    expected = torch.zeros(7, 3).index_add_(0, result.indices, -2 * difference / 30)
    torch.testing.assert_close(layer.codebook.grad, expected)


def test_evaluation_changes_nothing():
    layer = VectorQuantizer(7, 3).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(randn(10, 3))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    other = VectorQuantizer(7, 3)
    other.load_state_dict(before)
    assert torch.equal(other.codebook, layer.codebook)


def test_finds_the_clusters_and_revives_dead_codes():
    torch.manual_seed(0)
    centers = 5 * randn(8, 4)
    z = centers[torch.arange(400) % 8] + 0.1 * randn(400, 4, seed=1)
    layer = VectorQuantizer(16, 4, decay=0.8, restart_below=0.5)
    layer.codebook.add_(100)  # far away: one code wins all rows, the others die
    layer.total.add_(100)
    first = layer(z)
    assert first.perplexity < 2
    for _ in range(40):
        last = layer(z)
    assert last.perplexity > 8 and last.loss < 0.25 * 0.02
    found = torch.cdist(centers, layer.codebook).amin(1)
    assert found.max() < 0.3


def test_repeats_bit_for_bit():
    def run(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        layer = VectorQuantizer(50, 8)
        for step in range(3):
            layer(randn(3000, 8, seed=step))
        return layer.codebook

    before = torch.get_num_threads()
    try:
        assert torch.equal(run(1), run(2))
    finally:
        torch.set_num_threads(before)


def test_half_precision_and_empty():
    layer = VectorQuantizer(7, 3)
    result = layer(randn(10, 3).bfloat16())
    assert result.values.dtype == torch.bfloat16 and result.loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(randn(10, 3)).values.dtype == torch.float32
    codebook = layer.eval().codebook.clone()
    empty = layer(randn(0, 3))
    assert empty.values.shape == (0, 3) and empty.loss == 0 and empty.perplexity == 1
    assert torch.equal(layer.codebook, codebook)


@pytest.mark.parametrize(
    "match, options",
    [
        ("num_codes must be", {"num_codes": 0}),
        ("decay must be", {"decay": 1.0}),
        ("commitment must be", {"commitment": -1.0}),
        ("eps must be", {"eps": 0.0}),
        ("restart_below must be", {"restart_below": -1.0}),
        ("go with a decay", {"decay": None, "restart_below": 1.0}),
    ],
)
def test_refuses(match, options):
    with pytest.raises(ValueError, match=match):
        VectorQuantizer(**{"num_codes": 4, "dim": 3, **options})
    with pytest.raises(ValueError, match="z must be"):
        VectorQuantizer(4, 3)(torch.ones(2, 4))


# ---- two processes ------------------------------------------------------------------------------


def train(layer, parts):
    torch.manual_seed(1)
    for z in parts:
        layer(z)
    return layer.codebook


def worker(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.manual_seed(0)
    layer = VectorQuantizer(9, 3, decay=0.7, group=dist.group.WORLD, dtype=torch.float64)
    z = randn(5, 2, 12, 3, dtype=torch.float64)
    codebook = train(layer, z[:, rank])
    torch.manual_seed(0)
    restarts = VectorQuantizer(9, 3, restart_below=5.0, group=dist.group.WORLD)
    results[rank] = codebook, train(restarts, z[:, rank].float())
    dist.destroy_process_group()


def test_two_processes_share_one_codebook():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, results), nprocs=2)
        one, two = results[0], results[1]
    torch.manual_seed(0)
    alone = VectorQuantizer(9, 3, decay=0.7, dtype=torch.float64)
    expected = train(alone, randn(5, 2, 12, 3, dtype=torch.float64).flatten(1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    torch.testing.assert_close(one[0], expected)
