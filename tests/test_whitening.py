"""Whitening against its definition: W Σ Wᵀ = I, and what distinguishes the kinds."""

import pytest
import torch

import weft

KINDS = ("zca", "pca", "cholesky")


def features(N=500, D=7, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, dtype=torch.float64, generator=generator)
    return torch.randn(N, D, dtype=torch.float64, generator=generator) @ mix + offset


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_covariance_becomes_the_identity(kind, offset):
    x = features(offset=offset)
    w = weft.whitening(x, kind)
    z = w(x)
    identity = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(z.mT.cov(), identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(z.mean(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(w.inverse(z), x, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(w.matrix @ w.inverse_matrix, identity, rtol=0, atol=1e-10)


def test_what_distinguishes_the_kinds():
    x = features()
    zca, pca, cholesky = (weft.whitening(x, kind).matrix for kind in KINDS)
    torch.testing.assert_close(zca, zca.mT, rtol=0, atol=1e-12)
    assert torch.equal(cholesky, cholesky.tril())
    # rows of the PCA map are directions, the largest variance first, with their sign fixed
    variance = 1 / pca.square().sum(1)
    assert (variance.diff() < 0).all()
    largest = pca.gather(1, pca.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    # all differ by a rotation: WᵀW is the inverse covariance
    for matrix in (zca, pca, cholesky):
        torch.testing.assert_close(matrix.mT @ matrix, torch.linalg.inv(x.mT.cov()))


@pytest.mark.parametrize("kind", KINDS)
def test_rank_deficient_data(kind):
    x = features()[:, [0, 1, 2, 0]]
    with pytest.raises(ValueError, match="singular"):
        weft.whitening(x, kind)
    for options in ({"eps": 1e-3}, {"shrinkage": 0.1}):
        w = weft.whitening(x, kind, **options)
        assert w(x).isfinite().all() and w.eigenvalues[-1] < 1e-12
    full = weft.whitening(x, kind, shrinkage=1.0)
    inverse = torch.eye(4, dtype=torch.float64) / w.eigenvalues.mean()
    torch.testing.assert_close(full.matrix.mT @ full.matrix, inverse, rtol=1e-12, atol=1e-12)


def test_from_statistics():
    """Pooled within-class covariance and the mean of all rows."""
    x, labels = features(), torch.arange(500) % 3
    stats = weft.segment_stats(x, labels, 3, covariance="shared")
    w = weft.whitening(stats)
    within = x - torch.stack([x[labels == c].mean(0) for c in range(3)])[labels]
    covariance = within.mT @ within / (500 - 3)
    identity = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(w.matrix @ covariance @ w.matrix.mT, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(w.mean, x.mean(0))
    with pytest.raises(ValueError, match="covariance='shared'"):
        weft.whitening(weft.segment_stats(x, labels, 3))


def test_effective_rank():
    """Equal variances in k of D directions: k. One direction: 1."""
    q = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64)).Q
    q = torch.cat([q, -q])  # orthogonal columns of mean 0
    for k in (1, 3, 8):
        x = q * (torch.arange(8) < k)
        rank = weft.whitening(x, eps=1.0).effective_rank
        torch.testing.assert_close(rank, torch.tensor(float(k), dtype=torch.float64))
    assert weft.whitening(torch.ones(5, 3), eps=1.0).effective_rank == 0


def test_dtype_of_the_features_is_kept():
    x = features().float()
    w = weft.whitening(x)
    for dtype in (torch.float32, torch.bfloat16):
        assert w(x.to(dtype)).dtype == dtype and w.matrix.dtype == torch.float64
    assert w(x.view(5, 100, 7)).shape == (5, 100, 7)


@pytest.mark.parametrize(
    "error, match, data, options",
    [
        (ValueError, "kind must be", torch.randn(9, 3), {"kind": "qr"}),
        (ValueError, "eps must be", torch.randn(9, 3), {"eps": -1.0}),
        (ValueError, "shrinkage must be", torch.randn(9, 3), {"shrinkage": 1.5}),
        (ValueError, "N >= 2", torch.randn(1, 3), {}),
        (ValueError, "finite", torch.full((9, 3), torch.nan), {}),
        (TypeError, "data must be", torch.ones(9, 3, dtype=torch.int64), {}),
        (TypeError, "data must be", [[1.0]], {}),
    ],
)
def test_bad_input(error, match, data, options):
    with pytest.raises(error, match=match):
        weft.whitening(data, **options)


def test_features_of_another_size():
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 7\)"):
        weft.whitening(features())(torch.ones(3, 5))
