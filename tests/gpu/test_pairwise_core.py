"""The pairwise core on a GPU at sizes where it is used: exact indices, accuracy, memory."""

import pytest
import torch

import weft
from weft.ops.cases import randn

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALF = torch.bfloat16


def extra_memory(run) -> int:
    """Bytes at the peak beyond what is allocated before and what the call returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    kept = sum(t.numel() * t.itemsize for t in results)
    return torch.cuda.max_memory_allocated() - before - kept


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("metric", ["sqeuclidean", "dot"])
def test_nearest_is_exact(metric, dtype):
    """The indices of a search in float64, among 200,000 rows of which many are near."""
    x, y = (randn(n, 128, dtype=dtype, device=DEVICE, seed=n) for n in (100, 200_000))
    y[100_000:] = y[:100_000]
    found = weft.nearest(x, y, k=10, metric=metric)
    wide = (x.double(), y.double())
    v = wide[0] @ wide[1].T if metric == "dot" else -torch.cdist(*wide).square()
    order = v.sort(dim=1, descending=True, stable=True).indices[:, :10]
    best = v.gather(1, order)
    torch.testing.assert_close(v.gather(1, found.indices), best, rtol=1e-9, atol=1e-9)
    assert (found.indices[:, ::2] < 100_000).all()  # of two copies the first


def test_nearest_memory():
    x, y = (randn(n, 128, dtype=HALF, device=DEVICE, seed=n) for n in (10_000, 1_000_000))
    assert extra_memory(lambda: weft.nearest(x, y, k=10)) <= 100 << 20


def test_late_interaction():
    queries = randn(1, 32, 128, dtype=torch.float16, device=DEVICE)
    documents = randn(1000, 1024, 128, dtype=torch.float16, device=DEVICE, seed=1)
    found = weft.maxsim(queries, documents)
    s = torch.einsum("qid,njd->qnij", queries.float(), documents.float())
    torch.testing.assert_close(found.float(), s.amax(-1).sum(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_contrastive_loss(symmetric):
    """Gradients as in float64, and memory that does not grow with N²."""
    extra = []
    for N in (4096, 16384):
        x, y = (torch.nn.functional.normalize(randn(N, 512, device=DEVICE, seed=s), dim=-1)
                for s in (0, 1))  # fmt: skip
        x, y = (t.to(HALF).requires_grad_() for t in (x, y))

        def step(x=x, y=y):
            loss = weft.contrastive_loss(x, y, temperature=0.07, symmetric=symmetric)
            return loss, *torch.autograd.grad(loss, (x, y))

        loss, grad_x, _ = step()
        gradients = 4 * (x.numel() + y.numel())
        extra.append(extra_memory(step) - gradients)
        if N == 4096:
            wide = x.detach().double().requires_grad_()
            s = wide @ y.detach().double().T / 0.07
            target = torch.arange(N, device=DEVICE)
            truth = torch.nn.functional.cross_entropy(s, target)
            if symmetric:
                truth = (truth + torch.nn.functional.cross_entropy(s.T, target)) / 2
            (expected,) = torch.autograd.grad(truth, wide)
            assert abs(float(loss - truth)) <= 1e-5 * float(truth)
            assert (grad_x - expected).norm() <= 1e-2 * expected.norm()
    assert max(extra) <= 256 << 20, extra


@pytest.mark.parametrize("D", [3, 64])
def test_gaussian_sum(D):
    x, y = randn(20_000, D, device=DEVICE), randn(20_000, D, device=DEVICE, seed=1)
    found = weft.pairwise(x, y, pair="rbf", reduce="sum", gamma=0.5 / D)
    truth = (-torch.cdist(x.double(), y.double()).square() * (0.5 / D)).exp().sum(1)
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    run = lambda: (weft.pairwise(x, y, pair="rbf", reduce="sum"),)  # noqa: E731
    assert extra_memory(run) <= 256 << 20
