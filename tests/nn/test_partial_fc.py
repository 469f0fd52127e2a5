"""PartialFC against the head over all classes."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import CosineClassifier, PartialFC
from weft.ops.cases import randn

LABELS = torch.tensor([3, 17, 3, 8, 0])


def test_all_classes_are_a_cosine_classifier():
    head = PartialFC(6, 20, sample_rate=1.0, scale=8.0, margin=0.2).double()
    full = CosineClassifier(6, 20, scale=8.0, margin=0.2).double()
    full.weight.data.copy_(head.weight)
    x = randn(5, 6, dtype=torch.float64)
    logits, targets = head(x, LABELS)
    assert torch.equal(targets, LABELS)
    torch.testing.assert_close(logits, full(x, LABELS))
    torch.testing.assert_close(head(x), full(x))


@pytest.mark.parametrize("sparse", [False, True])
def test_sample(sparse):
    """Chosen columns of all logits, with their gradients; no row is touched that is not there."""
    torch.manual_seed(0)
    head = PartialFC(6, 20, sample_rate=0.4, scale=8.0, margin=0.0, sparse=sparse).double()
    x = randn(5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    classes = head.sample(LABELS)
    torch.manual_seed(1)
    logits, targets = head(x, LABELS)
    assert len(classes) == len(classes.unique()) == 8
    assert torch.equal(classes[targets], LABELS)
    F.cross_entropy(logits, targets).backward()
    gradient = head.weight.grad
    assert gradient.is_sparse == sparse
    head.weight.grad = None
    expected = head(x)[:, classes]
    torch.testing.assert_close(logits, expected)
    F.cross_entropy(expected, targets).backward()
    torch.testing.assert_close(gradient.to_dense(), head.weight.grad)
    left_out = torch.ones(20, dtype=torch.bool).index_fill(0, classes, False)
    assert not gradient.to_dense()[left_out].any()


def test_the_others_are_sampled_evenly():
    torch.manual_seed(0)
    head = PartialFC(2, 20, sample_rate=0.4)
    counts = torch.zeros(20)
    for _ in range(2000):
        counts[head.sample(LABELS)] += 1
    own = LABELS.unique()
    assert (counts[own] == 2000).all()
    others = torch.ones(20, dtype=torch.bool).index_fill(0, own, False)
    expected = 2000 * 4 / 16
    assert (counts[others] - expected).abs().max() < 5 * (expected * 0.75) ** 0.5


def test_a_batch_of_more_classes_than_the_rate_has_room():
    head = PartialFC(3, 20, sample_rate=0.05)
    labels = torch.arange(15)
    logits, targets = head(randn(15, 3), labels)
    assert logits.shape == (15, 15) and torch.equal(targets, labels)
    assert head(randn(40, 3), torch.arange(40) % 20)[0].shape == (40, 20)


@pytest.mark.parametrize(
    "match, make",
    [
        ("sample_rate", lambda: PartialFC(3, 20, sample_rate=0.0)),
        ("scale", lambda: PartialFC(3, 20, scale=0.0)),
        ("margin", lambda: PartialFC(3, 20, margin=-1.0)),
        ("labels", lambda: PartialFC(3, 20)(torch.ones(1, 3), torch.tensor([20]))),
        ("x must be", lambda: PartialFC(3, 20)(torch.ones(1, 1, 3), torch.tensor([[0]]))),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
