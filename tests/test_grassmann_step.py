"""The Grassmann step against closed forms and against the formula with singular values."""

import math

import pytest
import torch
from conftest import IMPLEMENTATIONS, running

import weft
from weft.ops.cases import randn
from weft.ops.pairwise.cases.inputs import orthonormal

NATIVE = [i for i in IMPLEMENTATIONS if not i.startswith("triton")]
every_implementation = pytest.mark.parametrize("implementation", NATIVE)
REORTH = ["qr_signed", "polar", "newton_schulz", "gcr"]


def by_svd(P, G, lr):
    """(new basis, transported tangent) in float64."""
    P, G = P.double(), G.double()
    U, S, Vh = torch.linalg.svd(G - P @ (P.mT @ G), full_matrices=False)
    cosine, sine = (-lr * S).cos()[:, None], (-lr * S).sin()[:, None]
    rotated = P @ Vh.mT
    velocity = ((U * cosine - rotated * sine) * S[:, None]) @ Vh
    return (rotated * cosine + U * sine) @ Vh, velocity


def inputs(C, D, k, angle, dtype):
    """A basis, and a buffer whose tangent part has a largest singular value of about `angle`."""
    P = orthonormal(C, D, k, dtype, "cpu")
    G = randn(C, k, D, seed=3, dtype=torch.float64).mT
    return P, (G * (angle / torch.linalg.matrix_norm(G, 2)[:, None, None])).to(dtype)


def orthogonality(P):
    P = P.double()
    return (P.mT @ P - torch.eye(P.shape[-1], dtype=torch.float64)).abs().max().item()


@every_implementation
def test_rotation_of_a_plane(implementation):
    """A line in a plane turns by lr·‖H‖, and what turns it turns with it."""
    P = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    G = torch.tensor([[[7.0], [2.0]]], dtype=torch.float64)  # 7 along P has no effect
    with running(implementation):
        new, buffer = weft.grassmann_step(P, G, math.pi / 6 / 2, reorth=None)
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    torch.testing.assert_close(new, P.new_tensor([[[c], [-s]]]))
    torch.testing.assert_close(buffer, P.new_tensor([[[2 * s], [2 * c]]]))


@every_implementation
def test_independent_rotations(implementation):
    """Each column turns in a plane of its own, by its own angle, small and large ones together."""
    k, D = 5, 12
    angles = torch.tensor([0.0, 1e-6, 0.5, 3.0, 40.0], dtype=torch.float64)
    P = torch.eye(D, k, dtype=torch.float64)[None]
    G = torch.zeros_like(P)
    G[0, k : 2 * k] = torch.diag(angles)
    with running(implementation):
        new, buffer = weft.grassmann_step(P, G, -1.0, reorth=None)
    expected = torch.cat([torch.diag(angles.cos()), torch.diag(angles.sin())])
    torch.testing.assert_close(new[0, : 2 * k], expected, rtol=0, atol=1e-12)
    velocity = torch.cat([torch.diag(-angles * angles.sin()), torch.diag(angles * angles.cos())])
    torch.testing.assert_close(buffer[0, : 2 * k], velocity, rtol=0, atol=1e-11)


@every_implementation
@pytest.mark.parametrize("angle", [1e-12, 1e-3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("D, k", [(40, 1), (130, 7), (513, 16), (257, 32)])
def test_against_singular_values(implementation, D, k, angle):
    for dtype, tolerance in ((torch.float64, 4e-16), (torch.float32, 2e-7)):
        P, G = inputs(3, D, k, angle, dtype)
        expected, velocity = by_svd(P, G, 0.7)
        with running(implementation):
            new, buffer = weft.grassmann_step(P, G, 0.7, reorth=None)
        bound = tolerance * (4 + angle)
        assert (new - expected).abs().max() <= bound
        assert (buffer - velocity).abs().max() <= 10 * bound * velocity.abs().max()
        assert orthogonality(new) <= (3e-6 if dtype == torch.float32 else 2e-12)


@every_implementation
@pytest.mark.parametrize("reorth", REORTH)
def test_reorth(implementation, reorth):
    """Each finds the orthonormal basis that its name says, from a basis that has drifted."""
    P, G = inputs(4, 150, 6, 1.0, torch.float32)
    P = P + 1e-3 * randn(4, 150, 6, seed=9)
    with running(implementation):
        drifted, _ = weft.grassmann_step(P, G, 0.3, reorth=None)
        new, _ = weft.grassmann_step(P, G, 0.3, reorth=reorth)
    assert orthogonality(drifted) > 1e-3
    assert orthogonality(new) <= (3e-7 if implementation != "reference" else 2e-6)  # LAPACK's
    Q, R = torch.linalg.qr(drifted.double())
    if reorth == "qr_signed":
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    elif reorth != "gcr":
        U, _, Vh = torch.linalg.svd(drifted.double(), full_matrices=False)
        Q = U @ Vh
    assert (new - Q).abs().max() <= 1e-6


@every_implementation
@pytest.mark.parametrize("reorth", REORTH)
def test_reorth_of_a_bad_basis(implementation, reorth):
    """Columns of lengths 0.1 to 10: a second round is needed, and taken."""
    P = orthonormal(2, 90, 5, torch.float32, "cpu") * torch.tensor([0.1, 0.3, 1, 3, 10])
    P = P @ (torch.eye(5) + 0.3 * randn(5, 5))
    with running(implementation):
        new, _ = weft.grassmann_step(P, torch.zeros_like(P), 0.1, reorth=reorth)
    assert orthogonality(new) <= 2e-6
    outside = P - new @ (new.mT @ P)
    assert outside.abs().max() <= 1e-5 * P.abs().max()


@every_implementation
def test_householder_signs_of_special_bases(implementation):
    """LAPACK leaves a column alone that has nothing below its pivot."""
    for P in (torch.eye(6, 3), -torch.eye(6, 3), torch.eye(4), torch.eye(4).flip(0)):
        P = P.double()[None]
        with running(implementation):
            new, _ = weft.grassmann_step(P, torch.zeros_like(P), 0.1, reorth="gcr")
        torch.testing.assert_close(new, torch.linalg.qr(P).Q)


@every_implementation
def test_momentum_is_carried(implementation):
    """The new momentum is tangent at the new basis and as long as the old one was."""
    P, G = inputs(3, 211, 9, 2.0, torch.float64)
    H = G - P @ (P.mT @ G)
    for reorth in (None, "qr_signed", "polar", "newton_schulz"):
        with running(implementation):
            new, buffer = weft.grassmann_step(P, G, 0.4, reorth=reorth)
        assert (new.mT @ buffer).abs().max() <= 1e-14
        torch.testing.assert_close(torch.linalg.svdvals(buffer), torch.linalg.svdvals(H))
    # Going on along it is one longer step.
    with running(implementation):
        twice, _ = weft.grassmann_step(new, buffer, 0.4)
        once, _ = weft.grassmann_step(P, G, 0.8)
    torch.testing.assert_close(twice @ twice.mT, once @ once.mT)


@every_implementation
def test_descends(implementation):
    """Steps against the gradient find the leading eigenspace."""
    M = torch.diag(torch.arange(20, 0, -1, dtype=torch.float64))
    P = orthonormal(1, 20, 3, torch.float64, "cpu")
    with running(implementation):
        for _ in range(300):
            P, _ = weft.grassmann_step(P, -M @ P, 0.05)
    found = (P.mT @ M @ P).diagonal(dim1=-2, dim2=-1).sum()
    torch.testing.assert_close(found, found.new_tensor(20.0 + 19 + 18), rtol=1e-6, atol=0)


@every_implementation
def test_gradient_in_the_same_pass(implementation):
    P, B = inputs(3, 140, 5, 1.0, torch.float64)
    g = randn(3, 140, 5, dtype=torch.float64, seed=8)
    options = {"grad": g, "momentum": 0.9, "dampening": 0.2}
    with running(implementation):
        for transport in (True, False):
            found = weft.grassmann_step(P, B, 0.1, transport=transport, **options)
            expected = weft.grassmann_step(P, 0.9 * B + 0.8 * g, 0.1, transport=transport)
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(one, two)


@every_implementation
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e8, 1e25, torch.nan])
def test_extremes(implementation, scale):
    P, G = inputs(2, 64, 4, 1.0, torch.float32)
    G = G * torch.tensor([scale, 1.0])[:, None, None]
    with running(implementation):
        new, buffer = weft.grassmann_step(P, G, 1.0)
        other, _ = weft.grassmann_step(P[1:], G[1:], 1.0)
    assert torch.equal(new[1:], other), "classes do not touch each other"
    if math.isnan(scale):
        assert new[0].isnan().all() and not new[1].isnan().any()
        return
    if scale < 1e20:
        assert orthogonality(new) <= 3e-6 and buffer.isfinite().all()
    if scale <= 1e-30:
        torch.testing.assert_close(new[0] @ new[0].mT, P[0] @ P[0].mT, rtol=0, atol=1e-6)


@every_implementation
def test_in_place(implementation):
    """Writes through the transposed view of a layer, counts as a change, leaves a kept buffer."""
    weight = orthonormal(3, 20, 4, torch.float32, "cpu").mT.contiguous()
    buffer = randn(3, 4, 20)
    expected = weft.grassmann_step(weight.mT, buffer.mT, 0.1)
    version, before = weight._version, buffer.clone()
    with running(implementation):
        weft.grassmann_step_(weight.mT, buffer.mT, 0.1, transport=False)
        assert torch.equal(buffer, before)
        assert weight._version > version
        torch.testing.assert_close(weight.mT, expected[0])


def test_in_place_refuses():
    P, G = orthonormal(2, 5, 2, torch.float32, "cpu"), torch.zeros(2, 5, 2)
    with pytest.raises(RuntimeError, match="torch.no_grad"):
        weft.grassmann_step_(P.requires_grad_(), G, 0.1)
    with pytest.raises(ValueError, match="buffer is broadcast"):
        weft.grassmann_step_(P.detach(), torch.zeros(5, 2).expand(2, 5, 2), 0.1)


def test_has_no_gradient():
    P, G = orthonormal(2, 5, 2, torch.float32, "cpu").requires_grad_(), torch.zeros(2, 5, 2)
    new, _ = weft.grassmann_step(P, G, 0.1)
    with pytest.raises(RuntimeError, match="step of an optimizer"):
        new.sum().backward()


def test_half_precision_is_float32_rounded():
    P, G = inputs(3, 90, 4, 1.0, torch.bfloat16)
    new, buffer = weft.grassmann_step(P, G, 0.3)
    exact = weft.grassmann_step(P.float(), G.float(), 0.3)
    assert torch.equal(new, exact[0].bfloat16()) and torch.equal(buffer, exact[1].bfloat16())
