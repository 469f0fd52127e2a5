"""Cases of a table read by relative position."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_relative_bias(table, index):
    """As Swin: rows of the table, with the heads moved forward."""
    return table[index].permute(2, 0, 1).contiguous()[None]


def window_index(side: int) -> torch.Tensor:
    """The difference of the places of two tokens of a window, as one number; (side², side²)."""
    axis = torch.arange(side)
    places = torch.cartesian_prod(axis, axis)
    difference = places[:, None] - places + side - 1
    return difference[..., 0] * (2 * side - 1) + difference[..., 1]


def _inputs(T, H, index):
    return lambda dtype, device: (randn(T, H, dtype=dtype, device=device), index.to(device))


SAMPLES = [
    Sample("plain", _inputs(5, 3, torch.tensor([[0, 4, 2], [1, 0, 0]]))),
    Sample("window", _inputs(25, 2, window_index(3))),
    Sample("one", _inputs(1, 1, torch.zeros(1, 1, dtype=torch.int64))),
    Sample("no_queries", _inputs(3, 2, torch.zeros(0, 4, dtype=torch.int64))),
    Sample(
        "transposed",
        lambda dtype, device: (
            randn(3, 25, dtype=dtype, device=device).T,
            window_index(3).T.to(device),
        ),
    ),
]
WORKLOADS = [
    Workload(
        "swin 169x3 of 49x49",
        _inputs(169, 3, window_index(7)),
        3 * 49 * 49,
        lambda item: 3 * 49 * 49 * item,
        backward_flops=3 * 49 * 49,
        quick=True,
    ),
    Workload(
        "16 heads of 1024x1024",
        _inputs(63 * 63, 16, window_index(32)),
        16 * 1024 * 1024,
        lambda item: 16 * 1024 * 1024 * item,
        backward_flops=16 * 1024 * 1024,
    ),
]


def _bad(error, match, table, index) -> BadInput:
    return BadInput(lambda: (table, index), error, match)


INDEX = torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    _bad(TypeError, "table must be a float tensor", INDEX, INDEX),
    _bad(TypeError, "index must be an int64 tensor", torch.zeros(4, 2), INDEX.int()),
    _bad(ValueError, "table must be .T, H.", torch.zeros(4), INDEX),
    _bad(ValueError, r"index must be in \[0, 4\), got 4", torch.zeros(4, 2), INDEX + 4),
    _bad(ValueError, r"index must be in \[0, 4\), got -1", torch.zeros(4, 2), INDEX - 1),
]

CASES = [OpCases("relative_bias", plain_relative_bias, SAMPLES, WORKLOADS, BAD)]
