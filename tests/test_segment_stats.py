"""Statistics of classes: closed forms, precision far from the origin, merging, ranks."""

import pytest
import torch
import torch.multiprocessing as multiprocessing
from conftest import IMPLEMENTATIONS, running

import weft
from weft.ops.cases import randn

C = 5


def rows(N=403, D=7, dtype=torch.float64, offset=0.0):
    labels = torch.randint(0, C - 1, (N,), generator=torch.Generator().manual_seed(2))
    return (randn(N, D, dtype=torch.float64) + offset).to(dtype), labels


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_agrees_with_var_and_cov_of_each_class(implementation):
    x, labels = rows()
    with running(implementation):
        stats = weft.segment_stats(x, labels, C, covariance="class")
        shared = weft.segment_stats(x, labels, C, covariance="shared")
    assert stats.count.dtype == torch.int64
    for c in range(C - 1):
        own = x[labels == c]
        assert stats.count[c] == len(own)
        torch.testing.assert_close(stats.mean[c], own.mean(0))
        torch.testing.assert_close(stats.variance()[c], own.var(0))
        torch.testing.assert_close(stats.variance(ddof=0)[c], own.var(0, correction=0))
        torch.testing.assert_close(stats.covariance_matrix()[c], own.mT.cov())
    pooled = stats.scatter.sum(0) / (len(x) - (C - 1))
    torch.testing.assert_close(shared.covariance_matrix(), pooled)
    for value in (stats.mean, stats.m2, stats.variance(), stats.covariance_matrix()):
        assert not value[C - 1].any()  # no rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_far_from_the_origin(implementation, offset):
    """Of variance 1.0 around 1000, E[x²] − E[x]² in float32 leaves one digit."""
    x, labels = rows(N=4001, dtype=torch.float32, offset=offset)
    with running(implementation):
        found = weft.segment_stats(x, labels, C).variance()
    truth = weft.segment_stats(x.double(), labels, C).variance()
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_rows_far_from_the_others(implementation):
    """No row is special: the mean moves away from where it began."""
    x, labels = rows(N=5003, dtype=torch.float32)
    x[:40] += 1e4
    with running(implementation):
        found = weft.segment_stats(x, labels, C)
    truth = weft.segment_stats(x.double(), labels, C)
    torch.testing.assert_close(found.mean.double(), truth.mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.m2.double(), truth.m2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_are_repetitions(implementation):
    x, labels = rows(N=60)
    times = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(3))
    with running(implementation):
        weighted = weft.segment_stats(x, labels, C, weights=times.float(), covariance="shared")
        repeated = weft.segment_stats(
            x.repeat_interleave(times, 0), labels.repeat_interleave(times), C, covariance="shared"
        )
    for one, two in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(one, two.to(one.dtype))


def test_gradient_in_weights():
    x, labels = rows(N=23)
    weights = torch.rand(23, dtype=torch.float64) + 0.5
    inputs = (x.requires_grad_(), weights.requires_grad_())

    def function(x, weights):
        return tuple(weft.segment_stats(x, labels, C, weights=weights, covariance="class"))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("covariance", [False, "shared", "class"])
@pytest.mark.parametrize("weighted", [False, True])
def test_batches_merge_into_the_whole(covariance, weighted):
    x, labels = rows(offset=100.0)
    weights = torch.rand(len(x), dtype=torch.float64) if weighted else None
    options = {"covariance": covariance}
    stats = weft.SegmentStats.empty(C, 7, weighted=weighted, dtype=torch.float64, **options)
    for part in torch.arange(len(x)).split(97):
        w = None if weights is None else weights[part]
        stats = weft.segment_stats(x[part], labels[part], C, previous=stats, weights=w, **options)
    whole = weft.segment_stats(x, labels, C, weights=weights, **options)
    for one, two in zip(stats, whole, strict=True):
        if two is not None:
            torch.testing.assert_close(one, two)
    nothing = weft.SegmentStats.empty(C, 7, dtype=torch.float64, **options)
    for one, two in zip(nothing.merge(whole), whole, strict=True):
        assert two is None or torch.equal(one, two.to(one.dtype))


def test_merging_is_differentiable():
    x, labels = rows(N=31)
    x.requires_grad_()
    whole = weft.segment_stats(x, labels, C)
    first = weft.segment_stats(x[:13], labels[:13], C)
    merged = weft.segment_stats(x[13:], labels[13:], C, previous=first)
    grads = [torch.autograd.grad(s.m2.square().sum() + s.mean.sum(), x) for s in (whole, merged)]
    torch.testing.assert_close(*grads)


def test_refuses_what_cannot_be_merged():
    x, labels = rows()
    stats = weft.segment_stats(x, labels, C)
    with pytest.raises(ValueError, match="other.count must be"):
        stats.merge(weft.SegmentStats.empty(C + 1, 7))
    with pytest.raises(ValueError, match="other.scatter must be"):
        stats.merge(weft.SegmentStats.empty(C, 7, covariance="shared"))
    with pytest.raises(ValueError, match="scatter is None"):
        stats.covariance_matrix()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_in_its_class_and_column(implementation):
    x, labels = rows(dtype=torch.float32)
    x[5, 2] = torch.nan
    with running(implementation):
        stats = weft.segment_stats(x, labels, C)
    expected = torch.zeros(C, 7, dtype=torch.bool)
    expected[labels[5], 2] = True
    assert torch.equal(stats.mean.isnan(), expected) and torch.equal(stats.m2.isnan(), expected)


def _rank(rank, file, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, labels = rows(N=101)
    mine = slice(0, 40) if rank == 0 else slice(40, 101)
    x = x[mine].clone().requires_grad_()
    stats = weft.segment_stats(x, labels[mine], C, covariance="shared", group=dist.group.WORLD)
    (grad,) = torch.autograd.grad(stats.mean.sum(), x)
    results.put((rank, [t.detach().tolist() for t in stats], grad.tolist()))
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, tmp_path / "rendezvous", results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found[0][1] == found[1][1]  # the same bits on both
    x, labels = rows(N=101)
    x.requires_grad_()
    whole = weft.segment_stats(x, labels, C, covariance="shared")
    for one, two in zip(found[0][1], whole, strict=True):
        torch.testing.assert_close(torch.tensor(one, dtype=two.dtype), two.detach())
    (grad,) = torch.autograd.grad(whole.mean.sum(), x)
    torch.testing.assert_close(torch.tensor(found[0][2] + found[1][2], dtype=x.dtype), grad)
