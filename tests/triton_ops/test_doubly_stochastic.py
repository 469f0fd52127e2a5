"""The Triton kernels of doubly stochastic matrices: extremes, lines without entries, NaN."""

import pytest
import torch

from weft.ops.cases import randn
from weft.ops.registration import INTERPRETED
from weft.reference.transport import doubly_stochastic as reference

common = pytest.importorskip("weft.triton_kernels.common")
kernels = pytest.importorskip("weft.triton_kernels.transport.doubly_stochastic")

ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.usefixtures("interpreted"),
]
SHAPES = [(3, 4, 4), (3, 5, 3), (2, 19, 18)]


@pytest.fixture
def interpreted():
    """Small tiles."""
    with common.tiles_at_most(16):
        yield


def check(scores, *options, tolerance=1e-4):
    scores = scores.to(DEVICE)
    grad = randn(*scores.shape, device=DEVICE, seed=5)
    for run, arguments in (
        ("doubly_stochastic", (scores,)),
        ("doubly_stochastic_backward", (grad, scores)),
    ):
        found = getattr(kernels, run)(*arguments, *options)
        wide = [t.double() for t in arguments]
        expected = getattr(reference, run)(*wide, *options)
        assert found.is_contiguous()
        torch.testing.assert_close(
            found.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last_rows", [True, False])
def test_extreme_scores(shape, last_rows):
    scores = 30 * randn(*shape)
    scores[:, 1] -= 3e4
    scores[:, :, 2] += 2e4
    check(scores, 1.0, 2, last_rows, 0.0, tolerance=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last_rows", [True, False])
def test_lines_without_entries(shape, last_rows):
    scores = randn(*shape)
    scores[0, 1], scores[1, :, 2], scores[:, 0, 0] = -torch.inf, -torch.inf, -torch.inf
    check(scores, 0.5, 2, last_rows, 0.0)


@pytest.mark.parametrize("stabilizer", [0.0, 1e-3])
def test_nan_stays_in_its_matrix(stabilizer):
    scores = randn(3, 4, 4)
    scores[1, 2, 3] = torch.nan
    check(scores, 0.5, 2, False, stabilizer)
    if not stabilizer:
        check(randn(2, 9, 10).index_put_((torch.tensor([1]), torch.tensor([3])), scores[1, 2, 3]),
              0.5, 1, True, 0.0)  # fmt: skip
