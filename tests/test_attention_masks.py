"""The masks of attention as the C++ kernels see them: states and bits of tiles, bounds."""

import pytest
import torch
from attention_masks import PLACES, SIZES, B, H, leaves, neighborhood, programs
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import native

LEVELS = native.supported_levels()
EMPTY, PARTIAL, FULL = 0, 1, 2


@pytest.fixture(params=LEVELS)
def level(request):
    with native.use_level(request.param):
        yield request.param


def check_tiles(mask, Nq, Nk, planes, heights=(64, 16, 48)):
    program, ints, tensors, meaning = mask
    for (b, h), height in [(plane, height) for plane in planes for height in heights]:
        allowed = meaning[b, h]
        results = [
            native.cpu_op("attention_mask_tiles")(
                torch.zeros(0), program, ints, tensors, B, H, Nq, Nk, b, h, height, by_query
            )
            for by_query in (False, True)
        ]
        for by_query, (states, words, keys, queries, seen) in enumerate(results):
            assert torch.equal(seen.bool(), allowed.any(0))
            for i, (begin, end) in enumerate(keys.tolist()):
                rows = allowed[i * height : (i + 1) * height]
                assert 0 <= begin <= end <= Nk and rows[:, begin:end].sum() == rows.sum()
                for j in range(states.shape[1]):
                    tile = rows[:, 64 * j : 64 * j + 64]
                    expected = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
                    assert states[i, j] == expected, (program, i, j)
                    if expected == PARTIAL:
                        found = torch.zeros(64, 64, dtype=torch.bool)
                        found[: tile.shape[0], : tile.shape[1]] = tile
                        unpacked = (words[i, j][:, None] >> PLACES & 1).bool()
                        assert torch.equal(unpacked if by_query else unpacked.T, found)
            for j, (begin, end) in enumerate(queries.tolist()):
                columns = allowed[:, 64 * j : 64 * j + 64]
                assert 0 <= begin <= end <= Nq and columns[begin:end].sum() == columns.sum()


@pytest.mark.parametrize("Nq, Nk", SIZES)
def test_tiles_of_every_leaf(level, Nq, Nk):
    for mask in leaves(Nq, Nk):
        if mask[0] != "neighborhood" or Nq == Nk:
            check_tiles(mask, Nq, Nk, [(0, 0), (3, 1)])


NEIGHBORHOODS = [
    ([130], [7], [1]),
    ([130], [6], [3]),
    ([200], [3], [66]),
    ([9, 15], [3, 5], [1, 1]),
    ([9, 15], [4, 5], [2, 3]),
    ([70, 2], [3, 2], [5, 1]),
    ([2, 70], [2, 9], [1, 7]),
    ([3, 4, 11], [3, 2, 3], [1, 2, 3]),
    ([5, 1, 30], [5, 1, 1], [1, 1, 1]),
    ([1], [1], [1]),
]


@pytest.mark.parametrize("shape, kernel, dilation", NEIGHBORHOODS)
def test_neighborhoods(level, shape, kernel, dilation):
    mask = neighborhood(shape, kernel, dilation)
    n = mask[3].shape[-1]
    check_tiles(mask, n, n, [(0, 0)])


def test_everything(level):
    meaning = torch.ones(B, H, 65, 70, dtype=torch.bool)
    check_tiles(("", [], [], meaning), 65, 70, [(1, 1)])


@settings(max_examples=40, deadline=None)
@given(programs(), st.sampled_from(LEVELS), st.sampled_from([(0, 0), (3, 1), (1, 1)]))
def test_tiles_of_random_programs(program, level, plane):
    mask, Nq, Nk = program
    with native.use_level(level):
        check_tiles(mask, Nq, Nk, [plane], heights=(64, 16))


@pytest.mark.parametrize(
    "program, ints, tensors",
    [
        ("band", [1], []),
        ("band &", [0, 1], []),
        ("band band", [0, 1, 0, 1], []),
        ("circle", [], []),
        ("band", [0, 1, 2], []),
        ("key_lengths", [], []),
        ("key_lengths", [], [torch.zeros(4)]),
        ("dense", [], [torch.ones(1, 1, 5, 8, dtype=torch.bool)]),
        ("dense", [], [torch.ones(1, 1, 5, 7)]),
        ("segments", [], [torch.zeros(1, 1, 5).long(), torch.zeros(1, 1, 5).long()]),
        ("neighborhood", [1, 7, 3, 3], []),
        ("blocks", [0, 1], [torch.ones(1, 1, 5, 7, dtype=torch.bool)]),
        ("bits", [], [torch.zeros(1, 1, 3, 1).long(), torch.zeros(1, 1, 1, 1).byte()]),
    ],
)
def test_what_is_not_a_program_is_refused(program, ints, tensors):
    with pytest.raises(RuntimeError, match="attention mask"):
        native.cpu_op("attention_mask_tiles")(
            torch.zeros(0), program, ints, tensors, B, H, 5, 7, 0, 0, 64, False
        )
