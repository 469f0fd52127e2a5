"""Prototype heads and their streaming statistics against all samples at once."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from weft.nn import (
    ClassStatistics,
    CosineClassifier,
    NearestMeanClassifier,
    TEENClassifier,
    calibrate_prototypes,
)
from weft.ops.cases import randn

LABELS = torch.tensor([0, 2, 2, 0, 1, 2, 0, 4, 2, 1, 1, 1])


def by_class(x, C=5):
    return [x[LABELS == c] for c in range(C)]


@pytest.mark.parametrize("kind", [None, "shared", "class"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_of_batches_are_those_of_all_samples(kind, offset):
    x = randn(12, 3, dtype=torch.float64) + offset
    statistics = ClassStatistics(3, 5, kind, dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 6), slice(6, 6), slice(6, 12)):
        statistics.update(x[part], LABELS[part])
    groups = by_class(x)
    assert statistics.count.tolist() == [3, 4, 4, 0, 1]
    for c, group in enumerate(groups):
        mean = group.mean(0) if len(group) else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(statistics.mean[c], mean, rtol=1e-12, atol=1e-12)
    scatter = [torch.cov(g.mT, correction=0) * len(g) if len(g) else 0 * x.mT @ x for g in groups]
    covariance = statistics.covariance()
    if kind == "shared":
        expected = sum(scatter) / (12 - 4)
    else:
        expected = torch.stack(
            [s / max(len(g) - 1, 1) for s, g in zip(scatter, groups, strict=True)]
        )
        if kind is None:
            expected = expected.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-9)
    if kind == "class":
        unbiased = torch.stack([torch.cov(g.mT) for g in groups if len(g) > 1])
        torch.testing.assert_close(covariance[:3], unbiased, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [None, "shared", "class"])
def test_statistics_of_two_processes_merge(kind):
    x = randn(12, 3, dtype=torch.float64)
    whole, left, right = (ClassStatistics(3, 5, kind, dtype=torch.float64) for _ in range(3))
    whole.update(x, LABELS)
    left.update(x[::2], LABELS[::2])
    right.update(x[1::2], LABELS[1::2])
    left.merge(right)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(left.state_dict()[name], value)
    with pytest.raises(ValueError, match="other"):
        left.merge(ClassStatistics(3, 4, kind))


def worker(rank, port, kind, results):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    statistics = ClassStatistics(3, 5, kind, dtype=torch.float64)
    statistics.update(randn(12, 3, dtype=torch.float64)[rank::2], LABELS[rank::2])
    statistics.merge_ranks()
    results[rank] = statistics.state_dict()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [None, "shared"])
def test_statistics_of_two_ranks_become_those_of_all(kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, kind, results), nprocs=2)
        one, two = results[0], results[1]
    whole = ClassStatistics(3, 5, kind, dtype=torch.float64)
    whole.update(randn(12, 3, dtype=torch.float64), LABELS)
    for name, value in whole.state_dict().items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], value)


def test_half_precision_leaves_statistics_alone():
    statistics = ClassStatistics(2, 1, "class")
    statistics.update(randn(1000, 2) + 100, torch.zeros(1000, dtype=torch.int64))
    before = {name: value.clone() for name, value in statistics.state_dict().items()}
    statistics.half().bfloat16()
    for name, value in statistics.state_dict().items():
        assert torch.equal(value, before[name])
    assert statistics.double().mean.dtype == torch.float64


def test_statistics_far_from_the_origin_keep_their_digits():
    x = randn(4000, 2) + 1000
    statistics = ClassStatistics(2, 1)
    for part in x.split(100):
        statistics.update(part, torch.zeros(100, dtype=torch.int64))
    truth = x.double().var(0)
    assert ((statistics.covariance()[0].double() - truth) / truth).abs().max() < 1e-4


def test_nearest_mean_is_a_search_over_class_means():
    x, queries = randn(12, 3, dtype=torch.float64), randn(7, 3, dtype=torch.float64, seed=1)
    head = NearestMeanClassifier(3, 5, dtype=torch.float64)
    assert (head(queries) == float("-inf")).all()
    head.update(x[:5], LABELS[:5])
    head.update(x[5:], LABELS[5:])
    logits = head(queries)
    for c, group in enumerate(by_class(x)):
        if not len(group):
            assert (logits[:, c] == float("-inf")).all()
            continue
        expected = -(queries - group.mean(0)).square().sum(1)
        torch.testing.assert_close(logits[:, c], expected)


def test_distances_far_from_the_origin():
    x = randn(12, 8) + 500
    head = NearestMeanClassifier(8, 5)
    head.update(x, LABELS)
    exact = -(x.double()[:, None] - head.statistics.mean.double()).square().sum(-1)
    seen = head.statistics.count > 0
    torch.testing.assert_close(head(x).double()[:, seen], exact[:, seen], rtol=1e-4, atol=1e-3)


def test_cosine_metric_is_simplecil():
    """The published head: prototypes as weights of a cosine layer; joint features for ADAM."""
    frozen, adapted = randn(12, 3, dtype=torch.float64), randn(12, 4, dtype=torch.float64, seed=1)
    x = torch.cat([frozen, adapted], -1)
    head = NearestMeanClassifier(7, 5, metric="cosine", scale=3.0, dtype=torch.float64)
    head.update(x, LABELS)
    for c, group in enumerate(by_class(x)):
        if len(group):
            expected = 3 * F.cosine_similarity(x, group.mean(0)[None])
            torch.testing.assert_close(head(x)[:, c], expected)


def published_calibration(base, new, t, a):
    """Row by row, as the formula is written."""
    base, new = ([v / v.norm() for v in rows] for rows in (base, new))
    result = []
    for n in new:
        weights = [torch.exp(t * torch.dot(b, n)) for b in base]
        delta = sum(w * b for w, b in zip(weights, base, strict=True)) / sum(weights)
        result.append((1 - a) * n + a * delta / delta.norm())
    return torch.stack(result)


def test_calibration():
    base, new = randn(4, 6, dtype=torch.float64), randn(3, 6, dtype=torch.float64, seed=1)
    expected = published_calibration(base, new, 5.0, 0.3)
    result = calibrate_prototypes(new, base, temperature=5.0, shift=0.3)
    torch.testing.assert_close(result, expected)
    unmoved = calibrate_prototypes(new, base, shift=0.0)
    torch.testing.assert_close(unmoved, new / new.norm(dim=1, keepdim=True))


def test_teen_calibrates_the_new_classes_alone():
    x, queries = randn(12, 6, dtype=torch.float64), randn(7, 6, dtype=torch.float64, seed=1)
    head = TEENClassifier(6, 3, 5, temperature=4.0, shift=0.25, scale=2.0, dtype=torch.float64)
    plain = NearestMeanClassifier(6, 5, metric="cosine", scale=2.0, dtype=torch.float64)
    for part in (slice(0, 4), slice(4, 12)):
        for h in (head, plain):
            h.update(x[part], LABELS[part])
    logits, means = head(queries), plain.statistics.mean
    torch.testing.assert_close(logits[:, :3], plain(queries)[:, :3])
    moved = published_calibration(means[:3], means[4:], 4.0, 0.25)
    torch.testing.assert_close(logits[:, 4], 2 * F.cosine_similarity(queries, moved))
    assert (logits[:, 3] == float("-inf")).all()


def test_teen_before_the_first_base_class():
    head = TEENClassifier(6, 3, 5)
    head.update(randn(2, 6), torch.tensor([4, 4]))
    assert head(randn(2, 6))[:, 4].isfinite().all()


@pytest.mark.parametrize("learn_scale", [False, True])
def test_cosine_classifier(learn_scale):
    head = CosineClassifier(6, 4, scale=10.0, margin=0.2, learn_scale=learn_scale).double()
    x, labels = randn(5, 6, dtype=torch.float64), torch.tensor([0, 3, 3, 1, 2])
    cosine = F.cosine_similarity(x[:, None], head.weight, dim=-1)
    torch.testing.assert_close(head(x), 10 * cosine, rtol=1e-6, atol=1e-6)
    for b, y in enumerate(labels):
        cosine[b, y] = cosine[b, y] - 0.2
    torch.testing.assert_close(head(x, labels), 10 * cosine, rtol=1e-6, atol=1e-6)
    head(x, labels).logsumexp(1).sum().backward()
    names = {name for name, p in head.named_parameters() if p.grad is not None}
    assert names == ({"weight", "log_scale"} if learn_scale else {"weight"})


@pytest.mark.parametrize(
    "error, match, make",
    [
        (ValueError, "covariance", lambda: ClassStatistics(3, 2, "half")),
        (TypeError, "dtype", lambda: ClassStatistics(3, 2, dtype=torch.float16)),
        (ValueError, "in_features", lambda: ClassStatistics(0, 2)),
        (ValueError, "metric", lambda: NearestMeanClassifier(3, 2, metric="l1")),
        (ValueError, "scale", lambda: CosineClassifier(3, 2, scale=-1.0)),
        (ValueError, "margin", lambda: CosineClassifier(3, 2, margin=-1.0)),
        (ValueError, "num_base", lambda: TEENClassifier(3, 4, 3)),
        (ValueError, "shift", lambda: TEENClassifier(3, 1, 3, shift=2.0)),
        (ValueError, "base", lambda: calibrate_prototypes(torch.ones(1, 3), torch.ones(0, 3))),
        (
            ValueError,
            "temperature",
            lambda: calibrate_prototypes(*[torch.ones(1, 3)] * 2, temperature=0),
        ),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_refuses_samples():
    head = NearestMeanClassifier(3, 2)
    good = torch.ones(2, 3)
    for error, match, x, labels in [
        (ValueError, "labels", good, torch.tensor([0, 2])),
        (ValueError, "labels", good, torch.tensor([0])),
        (TypeError, "labels", good, torch.tensor([0.0, 1.0])),
        (ValueError, "features", torch.ones(2, 4), torch.tensor([0, 1])),
        (TypeError, "features", torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1])),
    ]:
        with pytest.raises(error, match=match):
            head.update(x, labels)
    assert not head.statistics.count.any()
