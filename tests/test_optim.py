"""RiemannianSGD and ManifoldParameter."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import weft
from weft import ManifoldParameter
from weft.ops.cases import randn
from weft.ops.pairwise.cases.inputs import orthonormal
from weft.optim import RiemannianSGD


def rows(C, k, D, dtype=torch.float32):
    return orthonormal(C, D, k, dtype, "cpu").mT.contiguous()


def orthogonality(p):
    p = p.detach().double()
    return (p @ p.mT - torch.eye(p.shape[-2], dtype=torch.float64)).abs().max().item()


# ---- ManifoldParameter --------------------------------------------------------------------------


def copies_of(p):
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(p),
        "pickle": pickle.loads(pickle.dumps(p)),
        "torch.save": torch.load(file),
    }


@pytest.mark.parametrize("dims", [None, torch.tensor([2, 3])])
def test_parameter_keeps_its_kind(dims):
    p = ManifoldParameter(rows(2, 3, 5), "grassmann", dims=dims)
    assert isinstance(p, nn.Parameter) and p.requires_grad
    for how, twin in copies_of(p).items():
        assert type(twin) is ManifoldParameter, how
        assert twin.kind == "grassmann" and twin.requires_grad and torch.equal(twin, p)
        assert (twin.dims is None) if dims is None else torch.equal(twin.dims, dims)
    module = nn.Module()
    module.weight = p
    assert type(module.double().weight) is ManifoldParameter
    assert type(module.state_dict()["weight"]) is torch.Tensor
    assert type(p * 2) is torch.Tensor


@pytest.mark.parametrize(
    "error, match, data, options",
    [
        (TypeError, "data must be a floating", torch.ones(2, 3, dtype=torch.int64), {}),
        (TypeError, "data must be a floating", [1.0], {}),
        (ValueError, "kind must be one of .*'grassmann'", torch.ones(2, 3), {"kind": "sphere"}),
        (ValueError, "k <= D", torch.ones(3, 2), {}),
        (ValueError, r"\(\.\.\., D, D\)", torch.ones(2, 3), {"kind": "orthogonal"}),
        (TypeError, "dims must be an int64", torch.ones(4, 2, 3), {"dims": [1, 1, 1, 1]}),
        (ValueError, r"dims must be \(4,\)", torch.ones(4, 2, 3), {"dims": torch.tensor([1])}),
        (
            ValueError,
            "not of 'stiefel'",
            torch.ones(1, 2, 3),
            {"kind": "stiefel", "dims": torch.tensor([1])},
        ),
    ],
)
def test_parameter_refuses(error, match, data, options):
    with pytest.raises(error, match=match):
        ManifoldParameter(data, **options)


# ---- plain parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.5, "maximize": True},
    ],
)
def test_plain_parameters_get_sgd(options):
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    x = randn(8, 5)
    for model, kind in ((ours, RiemannianSGD), (theirs, torch.optim.SGD)):
        optimizer = kind(model.parameters(), lr=0.1, **options)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


# ---- Grassmann ----------------------------------------------------------------------------------


class Problem:
    """Sum over classes of −tr(PᵀAP): the solution is the leading eigenspace of each A."""

    def __init__(self, kind="grassmann", C=3, k=3, D=12, dtype=torch.float64, dims=None, **options):
        half = randn(C, D, D, dtype=dtype, seed=4)
        self.A = half @ half.mT / D
        start = rows(C, k, D, dtype)
        if dims is not None:
            start = start * (torch.arange(k) < dims[:, None])[..., None]
        self.p = ManifoldParameter(start, kind, dims=dims)
        self.optimizer = RiemannianSGD([self.p], **options)

    def loss(self):
        return -(self.p @ self.A * self.p).sum()

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        return self


@pytest.mark.parametrize("reorth", [None, "qr_signed", "polar", "newton_schulz"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_finds_the_eigenspace(reorth, momentum):
    problem = Problem(lr=0.02 if momentum else 0.1, momentum=momentum, reorth=reorth).run(400)
    best = -torch.linalg.eigvalsh(problem.A)[:, -3:].sum()
    torch.testing.assert_close(problem.loss(), best, rtol=1e-4, atol=0)
    assert orthogonality(problem.p) <= 1e-12


def test_ragged_padding_stays_zero():
    dims = torch.tensor([3, 1, 2])
    problem = Problem(lr=0.02, momentum=0.9, dims=dims).run(300)
    unused = torch.arange(3) >= dims[:, None]
    assert not problem.p[unused].any()
    for c, k in enumerate(dims.tolist()):
        best = torch.linalg.eigvalsh(problem.A[c])[-k:].sum()
        used = problem.p[c, :k]
        torch.testing.assert_close((used @ problem.A[c] * used).sum(), best, rtol=1e-3, atol=0)


def test_no_weight_decay_on_a_manifold():
    one, two = (Problem(lr=0.1, momentum=0.9, weight_decay=w).run(7) for w in (0.0, 0.5))
    assert torch.equal(one.p, two.p)


def test_maximize_ascends():
    start = Problem(lr=0.1).loss()
    assert Problem(lr=0.1, maximize=True).run(5).loss() > start


def test_each_parameter_counts_its_own_steps():
    """A parameter that rests some steps re-orthonormalises by its own count."""
    calls = []
    module = weft.optim.riemannian_sgd
    original = module.grassmann_step_

    def watched(basis, *args, reorth, **kwargs):
        calls.append((basis.shape[0], reorth))
        return original(basis, *args, reorth=reorth, **kwargs)

    one, two = (ManifoldParameter(rows(C, 2, 5)) for C in (1, 2))
    optimizer = RiemannianSGD([one, two], lr=0.1, reorth_every=3)
    module.grassmann_step_ = watched
    try:
        for step in range(7):
            one.grad = torch.zeros_like(one)
            two.grad = torch.zeros_like(two) if step % 2 else None
            optimizer.step()
    finally:
        module.grassmann_step_ = original
    every_third = ["qr_signed", None, None]
    assert [r for C, r in calls if C == 1] == (every_third * 3)[:7]
    assert [r for C, r in calls if C == 2] == every_third


def original_trajectory(problem, steps, lr, momentum, dampening, every):
    """The published algorithm, re-implemented: thin SVD, LAPACK's QR, Euclidean momentum."""
    P, buffer = problem.p.detach().mT.clone(), None
    for step in range(steps):
        gradient = -2 * problem.A @ P
        if buffer is None:
            buffer = gradient
        else:
            buffer = momentum * buffer + (1 - dampening) * gradient
        U, S, Vh = torch.linalg.svd(buffer - P @ (P.mT @ buffer), full_matrices=False)
        cosine, sine = (-lr * S).cos()[:, None], (-lr * S).sin()[:, None]
        P = (P @ Vh.mT * cosine + U * sine) @ Vh
        if step % every == 0:
            P = torch.linalg.qr(P).Q
    return P.mT


@pytest.mark.parametrize("k", [1, 3, 8])
def test_gcr_repeats_the_original(k):
    options = {"lr": 0.03, "momentum": 0.9, "dampening": 0.1}
    problem = Problem(k=k, reorth="gcr", reorth_every=5, **options)
    expected = original_trajectory(problem, 23, every=5, **options)
    torch.testing.assert_close(problem.run(23).p.detach(), expected, rtol=0, atol=1e-10)


def test_signs_of_the_original_turn_momentum_back():
    """Without a gradient a line keeps turning by its momentum; a flipped column makes it return."""
    for reorth, angle in (("qr_signed", 0.6), ("gcr", 0.0)):
        p = ManifoldParameter(torch.tensor([[[0.8, 0.6]]], dtype=torch.float64))
        optimizer = RiemannianSGD([p], lr=0.3, momentum=1.0, reorth=reorth, reorth_every=1)
        for push in (torch.tensor([[[-0.6, 0.8]]], dtype=torch.float64), torch.zeros(1, 1, 2)):
            p.grad = push.double()
            optimizer.step()
        turned = torch.acos((p.detach()[0, 0] @ p.new_tensor([0.8, 0.6])).abs().clamp(max=1))
        # Euclidean momentum is projected in the second step: it loses 1 − cos of the angle.
        assert abs(turned - angle) < 0.02


# ---- Stiefel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, k", [("stiefel", 3), ("orthogonal", 12)])
@pytest.mark.parametrize("reorth", ["qr_signed", "polar", "newton_schulz"])
def test_stiefel_solves_procrustes(kind, k, reorth):
    """max tr(XᵀB) over orthonormal X is the polar factor of B, which no span can tell."""
    target = rows(2, k, 12, torch.float64)
    p = ManifoldParameter(target + 0.2 * randn(2, k, 12, dtype=torch.float64), kind)
    p.data = torch.linalg.qr(p.data.mT).Q.mT * torch.ones(())
    if torch.linalg.det(p.data @ target.mT).min() < 0:  # the other component cannot be reached
        p.data[torch.linalg.det(p.data @ target.mT) < 0, 0] *= -1
    optimizer = RiemannianSGD([p], lr=0.1, momentum=0.5, reorth=reorth)
    for _ in range(400):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
        assert orthogonality(p) <= 1e-10
    torch.testing.assert_close(p.detach(), target, rtol=0, atol=1e-5)


# ---- as an optimizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_dict_resumes_bit_for_bit(momentum):
    options = {"lr": 0.05, "momentum": momentum, "reorth_every": 3}
    whole = Problem(**options).run(9)
    first = Problem(**options).run(4)
    file = io.BytesIO()
    torch.save({"p": first.p.detach(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second = Problem(**options)
    second.p.data.copy_(saved["p"])
    second.optimizer.load_state_dict(saved["optimizer"])
    assert torch.equal(second.run(5).p, whole.p)
    third = copy.deepcopy(first)
    assert type(third.p) is ManifoldParameter
    assert third.optimizer.param_groups[0]["params"][0] is third.p
    assert torch.equal(third.run(5).p, whole.p)


def test_scheduler_closure_and_scaler():
    problem = Problem(lr=0.1, dtype=torch.float32, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(problem.optimizer, T_max=50)
    scaler = torch.amp.GradScaler("cpu")

    def closure():
        problem.optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    before = problem.loss()
    assert torch.equal(problem.optimizer.step(closure), before)
    for _ in range(50):
        problem.optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        scaler.step(problem.optimizer)
        scaler.update()
        schedule.step()
    assert problem.loss() < before and orthogonality(problem.p) <= 3e-6
    now = problem.p.detach().clone()
    problem.p.grad = torch.full_like(problem.p, torch.inf)
    scaler.step(problem.optimizer)
    assert torch.equal(problem.p, now), "the scaler skips a step that overflowed"


@pytest.mark.parametrize(
    "match, options",
    [
        ("lr must be", {"lr": -1.0}),
        ("momentum must be", {"momentum": -1.0}),
        ("weight_decay must be", {"weight_decay": -1.0}),
        ("reorth must be one of", {"reorth": "qr"}),
        ("reorth_every must be", {"reorth_every": 0}),
        ("nesterov needs", {"nesterov": True}),
        ("nesterov is not defined", {"nesterov": True, "momentum": 0.9}),
    ],
)
def test_refuses(match, options):
    with pytest.raises(ValueError, match=match):
        RiemannianSGD([ManifoldParameter(rows(1, 2, 3))], **{"lr": 0.1, **options})
