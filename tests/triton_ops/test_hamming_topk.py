"""The Triton search of binary codes: several tiles and parts, ties, top bits, k of every size."""

import pytest
import torch

import weft
from weft.ops.registration import INTERPRETED
from weft.reference.pairwise import hamming_topk as reference

common = pytest.importorskip("weft.triton_kernels.common")
kernels = pytest.importorskip("weft.triton_kernels.pairwise.hamming_topk")

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


def codes(N, M, W, high=256):
    generator = torch.Generator().manual_seed(0)
    shapes = (N, W), (M, W)
    made = [torch.randint(0, high, s, generator=generator, dtype=torch.uint8) for s in shapes]
    return [one.to(DEVICE) for one in made]


def check(queries, database, k):
    expected = reference.hamming_topk(queries, database, k)
    for one, two in zip(kernels.hamming_topk(queries, database, k), expected, strict=True):
        assert one.is_contiguous() and one.dtype == two.dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize("k", [1, 5, 32])
@pytest.mark.parametrize("programs", [1, 6, 264])
def test_parts_of_the_database(programs, k, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(*codes(19, 75, 13), k)


@pytest.mark.parametrize("W", [0, 1, 4, 9])
def test_ties_go_to_the_lowest_index(W):
    check(*codes(3, 50, W, high=2), 7)


@pytest.mark.parametrize("N, M", [(3, 5), (0, 5), (3, 0)])
def test_fewer_codes_than_k(N, M):
    check(*codes(N, M, 6), 8)


def test_all_bits_differ():
    database = torch.full((20, 8), 255, dtype=torch.uint8, device=DEVICE)
    check(torch.zeros_like(database), database, 2)


def test_codes_that_start_at_any_byte():
    memory = codes(1, 1, 161)[0].flatten()[1:].view(20, 8)
    check(memory, memory, 3)


def test_more_codes_than_registers_hold():
    with weft.use("triton"), pytest.raises(Exception, match="33 > 32"):
        weft.hamming_topk(*codes(3, 50, 4), 33)
