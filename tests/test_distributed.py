"""Losses over a process group of two: those of one process on all rows, or on all classes."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

import weft
from weft.distributed import copy_to_group, sharded_cross_entropy
from weft.ops.cases import randn
from weft.ops.pairwise.cases.inputs import orthonormal

RANKS = 2
LABELS = torch.tensor([0, 1, 0, 3, 1, 0, 4, 4, 1, 5, 0, 6])
MASK = torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) < 0.5


def rows(N, D=7, seed=0):
    return F.normalize(randn(N, D, dtype=torch.float64, seed=seed), dim=1)


def share(t, rank):
    """The rows of one rank."""
    return None if t is None else t.chunk(RANKS)[rank]


CONTRASTIVE = {
    "infonce": {},
    "clip": {"symmetric": True},
    "sum": {"symmetric": True, "reduction": "sum"},
    "weighted": {"weights": torch.linspace(0.1, 2, 12, dtype=torch.float64), "mask": MASK},
    "supcon": {"kind": "supcon", "labels": LABELS, "symmetric": True},
    "supcon_own": {"kind": "supcon", "labels": LABELS, "own": True},
    "siglip": {"kind": "sigmoid", "bias": -1.0},
    "siglip_labels": {"kind": "sigmoid", "labels": LABELS},
}


def contrastive(name, rank=None):
    """Loss and gradients of x, y and temperature; of one rank, or of all rows without one."""
    options = dict(CONTRASTIVE[name])
    own = options.pop("own", False)
    x, y = rows(12), rows(12, seed=1)
    if rank is not None:
        x, y = share(x, rank), share(y, rank)
        for key in ("labels", "weights", "mask"):
            if key in options:
                options[key] = share(options[key], rank)
        options["group"] = dist.group.WORLD
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = weft.contrastive_loss(x, None if own else y, temperature=temperature, **options)
    grads = torch.autograd.grad(loss, (x, temperature) if own else (x, temperature, y))
    return [loss.detach(), *grads]


LINEAR = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2, "softcap": 2.0},
    "sum": {"reduction": "sum", "margin": 0.3},
    "none": {"reduction": "none"},
}


def linear(name, rank=None):
    x = rows(9).requires_grad_()
    weight, bias = randn(11, 7, dtype=torch.float64, seed=1), randn(11, dtype=torch.float64, seed=2)
    target = torch.arange(9) * 3 % 11
    target[4] = -100
    options = dict(LINEAR[name])
    if rank is not None:  # 6 and 5 classes
        weight, bias = share(weight, rank), share(bias, rank)
        options["group"] = dist.group.WORLD
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = weft.linear_cross_entropy(x, weight, target, bias, **options)
    upstream = torch.arange(1.0, 1 + loss.numel(), dtype=torch.float64).view_as(loss)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias), upstream)]


def subspaces(rank=None):
    """A Grassmann head whose classes are spread over ranks."""
    x, bases = rows(6).requires_grad_(), orthonormal(10, 7, 2, torch.float64, "cpu")
    target = torch.tensor([0, 9, 4, -100, 5, 2])
    if rank is None:
        logits = weft.subspace_logits(x, bases.requires_grad_(), gamma=5.0)
        loss = F.cross_entropy(logits, target, label_smoothing=0.1)
    else:
        bases = share(bases, rank).requires_grad_()
        logits = weft.subspace_logits(copy_to_group(x), bases, gamma=5.0)
        loss = sharded_cross_entropy(logits, target, label_smoothing=0.1)
    return [loss.detach(), *torch.autograd.grad(loss, (x, bases))]


def refusals():
    """What is refused on every rank, in words."""
    found = []
    world = {"temperature": 1.0, "group": dist.group.WORLD}
    x, rank = rows(4), dist.get_rank()
    for call in (
        lambda: weft.contrastive_loss(x[: 3 + rank], x, **world),
        lambda: weft.contrastive_loss(x, x, mask=torch.ones(4, 4, dtype=torch.bool), **world),
        lambda: weft.linear_cross_entropy(x, x, torch.tensor([0, 1, 8, 1]), group=dist.group.WORLD),
    ):
        with pytest.raises(ValueError) as error:
            call()
        found.append(str(error.value))
    return found


def worker(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=RANKS, rank=rank)
    results[rank] = {
        **{f"contrastive {name}": contrastive(name, rank) for name in CONTRASTIVE},
        **{f"linear {name}": linear(name, rank) for name in LINEAR},
        "subspaces": subspaces(rank),
        "refusals": refusals(),
    }
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, results), nprocs=RANKS)
        return [results[rank] for rank in range(RANKS)]


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_is_that_of_all_rows(ranks, name):
    loss, of_x, of_temperature, *of_y = contrastive(name)
    found = [rank[f"contrastive {name}"] for rank in ranks]
    for rank in found:
        torch.testing.assert_close(rank[0], loss)
    torch.testing.assert_close(torch.cat([rank[1] for rank in found]), of_x)
    torch.testing.assert_close(sum(rank[2] for rank in found), of_temperature)
    if of_y:
        torch.testing.assert_close(torch.cat([rank[3] for rank in found]), of_y[0])


@pytest.mark.parametrize("name", LINEAR)
def test_linear_is_that_of_all_classes(ranks, name):
    loss, of_x, of_weight, of_bias = linear(name)
    found = [rank[f"linear {name}"] for rank in ranks]
    for rank in found:
        torch.testing.assert_close(rank[0], loss)
        torch.testing.assert_close(rank[1], of_x)
    torch.testing.assert_close(torch.cat([rank[2] for rank in found]), of_weight)
    torch.testing.assert_close(torch.cat([rank[3] for rank in found]), of_bias)


def test_subspaces_are_those_of_all_classes(ranks):
    loss, of_x, of_bases = subspaces()
    found = [rank["subspaces"] for rank in ranks]
    for rank in found:
        torch.testing.assert_close(rank[0], loss)
        torch.testing.assert_close(rank[1], of_x)
    torch.testing.assert_close(torch.cat([rank[2] for rank in found]), of_bases)


def test_refuses(ranks):
    for rank in ranks:
        sizes, mask, target = rank["refusals"]
        assert "x must have as many rows on every rank, got [3, 4]" in sizes
        assert "mask must be (4, 8)" in mask and "target must be in [0, 8)" in target
