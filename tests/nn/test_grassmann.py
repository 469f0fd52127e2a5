"""GrassmannClassifier as a head: training, compiling, copying, mixed precision, two processes."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weft import ManifoldParameter
from weft.nn import GrassmannClassifier
from weft.ops.cases import randn
from weft.optim import RiemannianSGD

SIZES = [{"dim": 3}, {"dim": [3, 1, 2, 3]}]


def orthogonality(head):
    gram = head.weight.detach().double() @ head.weight.detach().double().mT
    k = head.weight.shape[1]
    used = torch.full((len(gram),), k) if head.dims is None else head.dims
    identity = torch.diag_embed((torch.arange(k) < used[:, None]).double())
    return (gram - identity).abs().max().item()


def train(head, x, labels, steps, momentum=0.9, label_smoothing=0.0):
    optimizer = RiemannianSGD(head.parameters(), lr=0.05, momentum=momentum)
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(head(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("sizes", SIZES)
def test_formula_and_shapes(sizes):
    head = GrassmannClassifier(10, 4, **sizes, gamma=7.0)
    assert head.weight.shape == (4, 3, 10) and orthogonality(head) <= 3e-6
    x = randn(2, 5, 10)
    projections = torch.einsum("...d,ckd->...ck", x / x.norm(dim=-1, keepdim=True), head.weight)
    torch.testing.assert_close(head(x), 7 * projections.norm(dim=-1))
    assert head(x[0, 0]).shape == (4,) and head(x[:0]).shape == (0, 5, 4)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_learns(sizes, label_smoothing):
    torch.manual_seed(0)
    centers = nn.functional.normalize(randn(4, 10), dim=1)
    labels = torch.arange(64) % 4
    x = centers[labels] + 0.1 * randn(64, 10, seed=2)
    head = GrassmannClassifier(10, 4, **sizes)
    losses = train(head, x, labels, 60, label_smoothing=label_smoothing)
    assert losses[-1] < 0.7 * losses[0] and (head(x).argmax(1) == labels).float().mean() > 0.95
    assert orthogonality(head) <= 3e-6
    if head.dims is not None:
        assert not head.weight[torch.arange(3) >= head.dims[:, None]].any()


@pytest.mark.parametrize("sizes", SIZES)
def test_copies(sizes):
    head = GrassmannClassifier(10, 4, **sizes)
    x = randn(6, 10)
    other = GrassmannClassifier(10, 4, **sizes)
    other.load_state_dict(head.state_dict())
    moved = GrassmannClassifier(10, 4, **sizes, device="meta").to_empty(device="cpu")
    moved.load_state_dict(head.state_dict())
    for twin in (copy.deepcopy(head), other, moved):
        assert type(twin.weight) is ManifoldParameter and twin.weight.kind == "grassmann"
        assert torch.equal(twin(x), head(x))
        assert (twin.weight.dims is None) == (head.dims is None)
        losses = train(twin, x, torch.arange(6) % 4, 3)
        assert losses == train(copy.deepcopy(head), x, torch.arange(6) % 4, 3)


def test_double_and_repr():
    head = GrassmannClassifier(10, 4, dim=[3, 1, 2, 3]).double()
    assert head(randn(2, 10, dtype=torch.float64)).dtype == torch.float64
    assert "dim=[3, 1, 2, 3]" in repr(head) and "gamma=25" in repr(head)
    assert "dim=2" in repr(GrassmannClassifier(10, 4, 2))


def test_autocast():
    head = GrassmannClassifier(64, 10, 4)
    x = randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), head(x), rtol=0.02, atol=0.1)
    logits.float().logsumexp(1).sum().backward()
    assert head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("sizes", SIZES)
def test_compiles_to_one_graph(sizes):
    torch._dynamo.reset()
    head = GrassmannClassifier(10, 4, **sizes)
    x, labels = randn(8, 10), torch.arange(8) % 4
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")
    assert train(compiled, x, labels, 6) == train(head, x, labels, 6)


@pytest.mark.parametrize(
    "match, args",
    [
        ("in_features and num_classes", (10, 0, 2)),
        (r"dim must be from 1 to in_features = 10", (10, 4, 11)),
        (r"dim must be from 1 to in_features = 10", (10, 2, [0, 3])),
        ("dim must be one number or 4", (10, 4, [1, 3])),
        ("gamma must be", (10, 4, 2, -1.0)),
    ],
)
def test_refuses(match, args):
    options = {"gamma": args[3]} if len(args) > 3 else {}
    with pytest.raises(ValueError, match=match):
        GrassmannClassifier(*args[:3], **options)


def test_refuses_features_of_another_size():
    with pytest.raises(ValueError, match="x must be"):
        GrassmannClassifier(10, 4, 2)(torch.ones(3, 9))


# ---- two processes ------------------------------------------------------------------------------


def model(ragged):
    torch.manual_seed(0)
    sizes = {"dim": [3, 1, 2, 3]} if ragged else {"dim": 3}
    return nn.Sequential(nn.Linear(7, 10), GrassmannClassifier(10, 4, **sizes)).double()


def steps(network, x, labels):
    optimizer = RiemannianSGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(7):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()
    return [p.detach() for p in network.parameters()] + [p.grad for p in network.parameters()]


def worker(rank, port, ragged, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    x, labels = randn(12, 7, dtype=torch.float64), torch.arange(12) % 4
    network = DistributedDataParallel(model(ragged))
    results[rank] = steps(network, x[rank::2], labels[rank::2])
    dist.destroy_process_group()


@pytest.mark.parametrize("ragged", [False, True])
def test_two_processes_train_as_one(ragged):
    """Parameters and gradients are equal on both, and those of one process on the joined batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, ragged, results), nprocs=2)
        one, two = results[0], results[1]
    alone = steps(model(ragged), randn(12, 7, dtype=torch.float64), torch.arange(12) % 4)
    for a, b, c in zip(one, two, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
