"""ProtoPNetHead, STProtoPNetHead and their losses against the published code's formulas."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import ProtoPNetHead, ProtoPNetLoss, STProtoPNetHead, STProtoPNetLoss
from weft.ops.cases import randn

B, D, H, W, C, M = 6, 5, 3, 4, 3, 2
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def features(seed=0):
    """In [0, 1], as after a sigmoid: what the published costs assume."""
    return randn(B, D, H, W, dtype=torch.float64, seed=seed).sigmoid().requires_grad_()


def published_forward(head, x):
    """Distances by convolutions with the prototypes, pooled by max_pool2d of their negatives."""
    p = head.prototypes[:, :, None, None]
    square = F.conv2d(x**2, torch.ones_like(p))
    d = F.relu(square - 2 * F.conv2d(x, p) + (p**2).sum((1, 2, 3)).view(-1, 1, 1))
    d = -F.max_pool2d(-d, kernel_size=(H, W)).view(len(x), -1)
    return torch.log((d + 1) / (d + 1e-4)) @ head.last_layer.weight.mT, d


def published_costs(d, head):
    """Cluster and separation with the inverted distances of the published code."""
    identity = F.one_hot(head.classes, C).to(d)  # (P, C)
    own = identity[:, LABELS].mT
    cluster = (D - ((D - d) * own).max(1).values).mean()
    separation = (D - ((D - d) * (1 - own)).max(1).values).mean()
    return cluster, separation, (head.last_layer.weight * (1 - identity.mT)).norm(p=1)


def test_protopnet_is_the_published_one():
    head = ProtoPNetHead(D, C, M, dtype=torch.float64)
    assert head.prototypes.shape == (C * M, D) and head.classes.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.full((C, C * M), -0.5).double()
    for c in range(C):
        expected[c, M * c : M * c + M] = 1
    assert torch.equal(head.last_layer.weight, expected)
    x = features()
    logits, d = published_forward(head, x)
    output = head(x)
    torch.testing.assert_close(output.distances, d)
    torch.testing.assert_close(output.logits, logits)
    flat = (x.flatten(2)[:, None] - head.prototypes[..., None]).square().sum(2)
    assert torch.equal(output.positions, flat.argmin(2))
    terms = ProtoPNetLoss()(output, LABELS, head)
    cluster, separation, l1 = published_costs(d, head)
    total = F.cross_entropy(logits, LABELS) + 0.8 * cluster - 0.08 * separation + 1e-4 * l1
    for ours, wanted in zip(terms[2:], (cluster, separation, l1), strict=True):
        torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(terms.loss, total)
    inputs = (x, head.prototypes, head.last_layer.weight)
    ours, wanted = torch.autograd.grad(terms.loss, inputs), torch.autograd.grad(total, inputs)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def nearest_patches(prototypes, classes, batches, similarity):
    """Every place of every sample, one after the other; the first best one wins."""
    best, found = [-float("inf")] * len(prototypes), [None] * len(prototypes)
    number = 0
    for x, labels in batches:
        for sample, label in zip(x, labels, strict=True):
            for place in range(H * W):
                patch = sample.flatten(1)[:, place]
                for p, prototype in enumerate(prototypes):
                    value = similarity(patch, prototype).item()
                    if label == classes[p] and value > best[p]:
                        best[p], found[p] = value, (number, place, patch)
            number += 1
    return found


def test_push_moves_prototypes_onto_patches_of_their_class():
    head = ProtoPNetHead(D, C, M, dtype=torch.float64)
    batches = [(features(seed).detach(), LABELS.roll(seed)) for seed in range(3)]
    batches = [(x[y != 1], y[y != 1]) for x, y in batches]  # class 1 has no samples
    before = head.prototypes.detach().clone()
    found = nearest_patches(before, head.classes, batches, lambda a, b: -(a - b).square().sum())
    result = head.push(iter(batches))
    for p, place in enumerate(found):
        if head.classes[p] == 1:
            assert place is None and result.sample[p] == -1 and result.distance[p] == 0
            assert torch.equal(head.prototypes[p], before[p])
        else:
            assert (result.sample[p].item(), result.position[p].item()) == place[:2]
            assert torch.equal(head.prototypes[p], place[2])
            expected = (place[2] - before[p]).square().sum()
            torch.testing.assert_close(result.distance[p], expected)
    own = head(batches[0][0])
    assert own.distances.amin() < 1e-12


def published_support(support, trivial, m):
    """The closeness and discrimination costs of the published code."""
    off = 1 - torch.eye(C, dtype=torch.float64)

    def pairs(p):
        p = p.view(C, m, -1)
        dots = (p[:, :, :, None, None] * p.permute(2, 0, 1)[None, None]).sum(2)  # (C, m, C, m)
        return dots.permute(0, 2, 1, 3).reshape(C, C, -1)

    closeness = (-pairs(support).min(-1).values * off).sum() / off.sum()
    discrimination = (pairs(trivial).max(-1).values * off).sum() / off.sum()
    return closeness, discrimination


def test_st_protopnet_is_the_published_one():
    torch.manual_seed(0)
    head = STProtoPNetHead(D, C, M, dtype=torch.float64)
    maps = [randn(B, D, H, W, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2)]
    identity = F.one_hot(head.trivial.classes, C).double()
    own = identity[:, LABELS].mT
    totals, logits = [], []
    between = published_support(head.support.prototypes, head.trivial.prototypes, M)
    parts = ((head.trivial, maps[0], 0.08, between[1]), (head.support, maps[1], 0.48, between[0]))
    for part, x, separation, cost in parts:
        torch.testing.assert_close(part.prototypes.norm(dim=1), torch.ones(C * M).double())
        kernels = F.normalize(part.prototypes, dim=1)[:, :, None, None]
        s = torch.relu(F.conv2d(F.normalize(x, dim=1), kernels))
        s = F.max_pool2d(s, kernel_size=(H, W)).view(B, -1)
        logits.append(s @ part.last_layer.weight.mT)
        rows = part.prototypes.view(C, M, D)
        orthonormality = (rows @ rows.mT - torch.eye(M).double()).abs().sum()
        totals.append(
            F.cross_entropy(logits[-1], LABELS)
            - 0.8 * (s * own).max(1).values.mean()
            + separation * (s * (1 - own)).max(1).values.mean()
            + 1e-3 * orthonormality
            + cost
            + 1e-4 * (part.last_layer.weight * (1 - identity.mT)).norm(p=1)
        )
    output = head(*maps)
    torch.testing.assert_close(output.trivial_logits, logits[0])
    torch.testing.assert_close(output.logits, logits[0] + logits[1])
    terms = STProtoPNetLoss()(output, LABELS, head)
    inputs = [*maps, *head.parameters()]
    for ours, wanted in zip(terms, totals, strict=True):
        torch.testing.assert_close(ours, wanted)
        grads = torch.autograd.grad(ours, inputs, retain_graph=True, allow_unused=True)
        truth = torch.autograd.grad(wanted, inputs, retain_graph=True, allow_unused=True)
        for a, b in zip(grads, truth, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


def test_st_push_and_normalize():
    head = STProtoPNetHead(D, C, M, dtype=torch.float64)
    maps = [randn(B, D, H, W, dtype=torch.float64, seed=s) for s in (1, 2)]
    parts = (head.trivial, head.support)
    before = [part.prototypes.detach().clone() for part in parts]
    result = head.push([(*maps, LABELS)])
    for part, old, x, found in zip(parts, before, maps, result.values(), strict=True):
        unit = F.normalize(x, dim=1)
        wanted = nearest_patches(old, part.classes, [(unit, LABELS)], torch.dot)
        for p, (sample, place, patch) in enumerate(wanted):
            assert (found.sample[p].item(), found.position[p].item()) == (sample, place)
            torch.testing.assert_close(part.prototypes[p], patch)
    with torch.no_grad():
        head.trivial.prototypes.mul_(3)
    head.normalize_()
    torch.testing.assert_close(head.trivial.prototypes.norm(dim=1), torch.ones(C * M).double())


def test_one_class_and_half_precision():
    head = ProtoPNetHead(D, 1, 2)
    x = features().float()
    terms = ProtoPNetLoss()(head(x), torch.zeros(B, dtype=torch.int64), head)
    terms.loss.backward()
    assert terms.separation == 0 and terms.l1 == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).distances.dtype == torch.float32
        assert STProtoPNetHead(D, 2)(x).trivial_similarities.dtype == torch.float32


def test_refuses():
    head = ProtoPNetHead(D, C, M)
    output = head(features().float())
    for match, make in [
        ("prototypes_per_class", lambda: ProtoPNetHead(D, C, 0)),
        ("activation must be", lambda: ProtoPNetHead(D, C, activation="rbf")),
        ("eps must be", lambda: ProtoPNetHead(D, C, eps=0.0)),
        ("num_classes", lambda: STProtoPNetHead(D, 0)),
        ("labels must be", lambda: ProtoPNetLoss()(output, LABELS + 1, head)),
        (
            "at least one sample",
            lambda: ProtoPNetLoss()(head(torch.ones(0, D, 1, 1)), LABELS, head),
        ),
        ("labels must be", lambda: head.push([(torch.ones(2, D, 1, 1), LABELS)])),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
