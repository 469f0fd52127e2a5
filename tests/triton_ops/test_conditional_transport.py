"""The Triton kernels of conditional transport: several tiles, weights of 0, any temperature."""

import pytest
import torch

from weft.ops.cases import randn
from weft.ops.registration import INTERPRETED
from weft.reference.transport import conditional_transport as reference

common = pytest.importorskip("weft.triton_kernels.common")
kernels = pytest.importorskip("weft.triton_kernels.transport.conditional_transport")

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


@pytest.mark.parametrize("temperature", [1e-40, 0.2, 1e30])
@pytest.mark.parametrize("weighted", [False, True])
def test_several_tiles(weighted, temperature):
    B, N, M = 2, 33, 18
    s = randn(B, N, M, device=DEVICE)
    logs = [None, None]
    if weighted:
        logs = [randn(B, n, device=DEVICE, seed=n) for n in (N, M)]
        for values in logs:
            values[0, 1::3] = -torch.inf
        logs[0][0, :16] = -torch.inf  # a whole block
        logs[1][1] = -torch.inf  # a whole problem
    arguments = (s, *logs, torch.tensor(temperature, device=DEVICE))
    found = kernels.conditional_transport(*arguments)
    expected = reference.conditional_transport(*arguments)
    for one, two in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    grads = [randn(B, n, device=DEVICE, seed=n + 1) for n in (N, M)]
    found = kernels.conditional_transport_backward(s, *grads, *arguments[1:], *found)
    expected = reference.conditional_transport_backward(s, *grads, *arguments[1:])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
