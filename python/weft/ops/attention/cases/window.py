"""Cases of attention in windows."""

import torch

from weft.ops.attention.cases.inputs import plain_attention, split_heads, tokens, with_more
from weft.ops.cases import BadInput, OpCases, Sample, Workload


def plain_window_attention(query, key, value, *, bias, region_ids=None, scale=None):
    """As Swin: the shift mask as a matrix for each window."""
    mask = None
    if region_ids is not None:
        same = region_ids[:, :, None] == region_ids[:, None]
        mask = same.repeat(query.shape[0] // same.shape[0], 1, 1)[:, None]
    return plain_attention(query, key, value, mask=mask, bias=bias, scale=scale)


def shifted_regions(side: int, window: int, shift: int) -> torch.Tensor:
    """The labels of the windows of a shifted grid, (nW, window²)."""
    part = torch.zeros(side, dtype=torch.int64)
    part[side - window :] = 1
    part[side - shift :] = 2
    labels = 3 * part[:, None] + part
    grid = labels.unflatten(0, (-1, window)).unflatten(2, (-1, window))
    return grid.permute(0, 2, 1, 3).reshape(-1, window * window)


def _swin(windows, heads, N, D):
    return with_more(split_heads(windows, heads, N, D), (heads, N, N))


SAMPLES = [
    Sample("plain", _swin(3, 2, 5, 4), keywords=("bias",)),
    Sample("one", _swin(1, 1, 1, 1), keywords=("bias",)),
    Sample(
        "regions",
        with_more(tokens(6, 2, 9, 9, 4), (2, 9, 9)),
        {"region_ids": shifted_regions(9, 3, 1)[:3]},
        keywords=("bias",),
    ),
    Sample(
        "swin", _swin(4, 2, 49, 16), {"region_ids": shifted_regions(14, 7, 3)}, keywords=("bias",)
    ),
]


def _work(windows, heads, N, D):
    product = 2.0 * windows * heads * N * N * D
    return {
        "flops": 2 * product,
        "backward_flops": 5 * product,
        "bytes": lambda item: 4 * windows * heads * N * D * item,
        "keywords": ("bias",),
    }


WORKLOADS = [
    Workload(
        "swin 256x3x49x32, shifted",
        _swin(256, 3, 49, 32),
        options={"region_ids": shifted_regions(56, 7, 3)},
        **_work(256, 3, 49, 32),
        quick=True,
    ),
    Workload("swin 256x3x49x32", _swin(256, 3, 49, 32), **_work(256, 3, 49, 32)),
    Workload(
        "swin 64x4x144x32, shifted",
        _swin(64, 4, 144, 32),
        options={"region_ids": shifted_regions(48, 12, 6)},
        **_work(64, 4, 144, 32),
    ),
]


def _make():
    return tokens(6, 2, 9, 9, 4)(torch.float32, "cpu")


BAD = [
    BadInput(_make, ValueError, "bias must broadcast", {"bias": torch.zeros(2, 9, 8)}),
    BadInput(
        _make,
        ValueError,
        "region_ids must be .nW, N.",
        {"bias": None, "region_ids": torch.zeros(9, dtype=torch.int64)},
    ),
    BadInput(
        _make,
        ValueError,
        "query_ids must be",
        {"bias": None, "region_ids": torch.zeros(4, 9, dtype=torch.int64)},
    ),
]

CASES = [OpCases("window_attention", plain_window_attention, SAMPLES, WORKLOADS, BAD)]
