"""Binary codes: packing, order, ties, and memory."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, running
from hypothesis import given, settings
from hypothesis import strategies as st

import weft


def by_counting(queries, database, k):
    """The definition, in Python integers."""
    rows = []
    for q in queries.tolist():
        distances = [
            sum((a ^ b).bit_count() for a, b in zip(q, c, strict=True)) for c in database.tolist()
        ]
        rows.append(sorted((d, j) for j, d in enumerate(distances))[:k])
    return rows


def codes(n, W, seed, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (n, W), generator=generator, dtype=torch.uint8)


def test_pack_bits():
    x = torch.tensor([[1.0, -1, 0, 2, -0.0, 3, -4, 5, 6], [-1.0] * 9])
    packed = weft.pack_bits(x)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0b10101001, 1], [0, 0]]
    assert weft.pack_bits(x > 0).equal(packed)
    assert weft.pack_bits(torch.zeros(2, 0)).shape == (2, 0)
    with pytest.raises(TypeError, match="x must be a real tensor"):
        weft.pack_bits(torch.ones(3, dtype=torch.complex64))


def test_distances_are_disagreements_of_signs():
    x, y = torch.randn(7, 37), torch.randn(11, 37)
    found = weft.hamming_topk(weft.pack_bits(x), weft.pack_bits(y), 11)
    expected = ((x > 0)[:, None] != (y > 0)).sum(-1)
    assert torch.equal(expected.gather(1, found.indices), found.distances)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=25)
@given(
    N=st.integers(0, 9),
    M=st.integers(0, 300),
    W=st.integers(1, 20),
    k=st.integers(1, 80),
    high=st.sampled_from([2, 256]),
)
def test_against_counting(implementation, N, M, W, k, high):
    queries, database = codes(N, W, 0, high), codes(M, W, 1, high)
    with running(implementation):
        distances, indices = weft.hamming_topk(queries, database, k)
    assert distances.dtype == torch.int32 and indices.dtype == torch.int64
    for row, d, i in zip(by_counting(queries, database, k), distances, indices, strict=True):
        assert list(zip(d.tolist(), i.tolist(), strict=True))[: len(row)] == row
        assert (i[len(row) :] == -1).all() and (d[len(row) :] == 2**31 - 1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_equal_codes(implementation):
    """Every code ties: the first k are the result, with several parts and full buffers."""
    database = torch.zeros(5000, 8, dtype=torch.uint8)
    database[4321] = 255
    with running(implementation):
        found = weft.hamming_topk(torch.zeros(3, 8, dtype=torch.uint8), database, 7)
    assert (found.indices == torch.arange(7)).all() and (found.distances == 0).all()
