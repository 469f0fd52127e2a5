"""Triton kernels with tiles so small that every loop runs several times.

With TRITON_INTERPRET=1 this runs without a GPU, and where there is a GPU, on it.
"""

import pytest
import torch
from conftest import ON_GPU, name_and_device, running, skip_unless_declared
from contract import SAMPLES, Call, check_accuracy, name_of

from weft.ops.registration import INTERPRETED

common = pytest.importorskip("weft.triton_kernels.common")

IMPLEMENTATION = "triton" if INTERPRETED else "triton@cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and IMPLEMENTATION not in ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def interpreted():
    """Marks what the interpreted leg runs besides the contract."""


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("cases, sample", SAMPLES, ids=name_of)
def test_accuracy_with_small_tiles(cases, sample, dtype, interpreted):
    skip_unless_declared(cases, IMPLEMENTATION, dtype)
    call = Call(cases, sample, dtype, name_and_device(IMPLEMENTATION)[1])
    with common.tiles_at_most(32):
        check_accuracy(call, running(IMPLEMENTATION))
