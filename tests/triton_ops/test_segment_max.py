"""The Triton kernels of the maxima over segments: several tiles, ties, bad lengths, one segment."""

import pytest
import torch

from weft.ops.cases import randn
from weft.ops.registration import INTERPRETED
from weft.reference.pairwise import segment_max as reference

common = pytest.importorskip("weft.triton_kernels.common")
kernels = pytest.importorskip("weft.triton_kernels.pairwise.segment_max")

ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.usefixtures("interpreted"),
]


@pytest.fixture
def interpreted():
    """Small tiles."""
    with common.tiles_at_most(16):
        yield


def check(x, y, base, lengths=None, offsets=None):
    expected = reference.segment_max(x, y, lengths, offsets, base)
    values, indices = kernels.segment_max(x, y, lengths, offsets, base)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[0], rtol=1e-4, atol=1e-5, equal_nan=True)
    grad = randn(*values.shape, device=DEVICE, seed=5)
    arguments = (grad, x, y, indices, offsets, base)
    tolerance = 1e-4 if x.dtype == torch.float32 else 1e-2
    for one, two in zip(
        kernels.segment_max_backward(*arguments),
        reference.segment_max_backward(*arguments),
        strict=True,
    ):
        assert one.is_contiguous()
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [3, 17])
@pytest.mark.parametrize("base", ["dot", "sqeuclidean"])
def test_several_tiles(base, D, dtype):
    x, y = randn(3, 18, D, dtype=dtype), randn(17, D, dtype=dtype, seed=1)
    lengths = torch.tensor([18, 0, 17], device=DEVICE)
    check(x.to(DEVICE), y.to(DEVICE), base, lengths)


@pytest.mark.parametrize("base", ["dot", "sqeuclidean"])
def test_packed(base):
    offsets = torch.tensor([0, 5, 5, 40], device=DEVICE)
    check(randn(40, 20, device=DEVICE), randn(5, 20, device=DEVICE, seed=1), base, None, offsets)


@pytest.mark.parametrize("base", ["dot", "sqeuclidean"])
def test_ties_go_to_the_first(base):
    x, y = randn(2, 40, 20, device=DEVICE), randn(5, 20, device=DEVICE, seed=1)
    x[:, 20:] = x[:, :20]
    x[1] = x[1, 0]
    check(x, y, base)


def test_products_that_float32_cannot_tell_apart():
    x = torch.ones(1, 40, 20, device=DEVICE)
    x[0, :, 0] += 2.0**-23 * (torch.arange(40, device=DEVICE) % 33)
    x[0, :, 1] = 1e6
    check(x, torch.ones(3, 20, device=DEVICE), "dot")


@pytest.mark.parametrize("base", ["dot", "sqeuclidean"])
def test_far_from_the_origin(base):
    check(100 + randn(2, 20, 20, device=DEVICE), 100 + randn(5, 20, device=DEVICE, seed=1), base)


def test_nan_and_infinity():
    x, y = randn(3, 20, 12, device=DEVICE), randn(5, 12, device=DEVICE, seed=1)
    x[0, 7, 3] = torch.nan
    x[1, 4, 2] = torch.inf
    x[2, 15:] = torch.nan
    lengths = torch.tensor([20, 20, 15], device=DEVICE)
    _, found = kernels.segment_max(x, y, lengths, None, "dot")
    _, expected = reference.segment_max(x, y, lengths, None, "dot")
    assert torch.equal(found, expected)


def test_lengths_and_offsets_out_of_range():
    """Nobody checks them on a GPU; no access is out of bounds."""
    x, y = randn(2, 6, 12, device=DEVICE), randn(3, 12, device=DEVICE, seed=1)
    wrong = torch.tensor([-4, 99], device=DEVICE)
    _, indices = kernels.segment_max(x, y, wrong, None, "dot")
    assert (indices[0] == -1).all() and (indices[1] < 6).all()
    wrong = torch.tensor([-7, 20, 3], device=DEVICE)
    _, indices = kernels.segment_max(x.flatten(0, 1), y, None, wrong, "dot")
    assert (indices[0] < 12).all() and (indices[1] == -1).all()
