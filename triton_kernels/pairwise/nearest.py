"""The k best pairs of each row, exactly: candidates in float32, then their order in float64.

1. candidates_kernel: a block of rows goes over the tiles of v of its part of the columns and keeps
   K > k keys, (v rounded to float32, j) as one integer. A key that is better than the worst of the
   list replaces it; a tile is left as soon as no row has such a key.
2. refine_kernel: v of a row's candidates by differences in float64, sorted. What is no candidate is
   at least the worst candidate less the error of step 1; a row whose k-th value is not below that
   bound is searched again in float64, so the result is that of a search in float64 in every case.

f is monotone, so v decides. A NaN comes first, what the mask excludes never.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, rounded
from weft.triton_kernels.pairwise.dense_tiles import allowed_tile
from weft.triton_kernels.pairwise.keys import (
    NONE,
    exact_argument,
    of_ordered_bits,
    ordered_bits,
    ordered_bits_64,
)
from weft.triton_kernels.pairwise.pairs import (
    Problem,
    apply_function,
    argument_tile,
    base_tile,
    problem_of,
    squared_norms,
)

MOST = 32  # neighbours
PROGRAMS = 264  # two for each multiprocessor


def _tiles(n: int, m: int, d: int) -> dict[str, int]:
    return {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d}


TABLE = {
    (80, "direct"): Config(_tiles(64, 64, 16), num_warps=8),
    (80, "half"): Config(_tiles(64, 64, 64), num_warps=4, num_stages=3),
    (80, "float"): Config(_tiles(64, 64, 32), num_warps=8, num_stages=2),
    (90, "half"): Config(_tiles(64, 128, 64), num_warps=8, num_stages=3),
    (90, "float"): Config(_tiles(64, 64, 32), num_warps=8, num_stages=3),
}
REFINE = {(80,): Config({"BLOCK_D": 32, "BLOCK_J": 64}, num_warps=4)}


@triton.jit
def candidates_kernel(
    x,
    y,
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_ym,
    stride_yd,
    x_squares,
    y_squares,
    scale,
    shift,
    row_factor,
    column_factor,
    row_bias,
    column_bias,
    parameter,
    mask,
    stride_mn,
    stride_mm,
    row_labels,
    column_labels,
    keys,
    part,
    parts,
    BASE: tl.constexpr,
    FUNCTION: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME: tl.constexpr,
    OFF_DIAGONAL: tl.constexpr,
    LARGEST: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The K smallest keys of BLOCK_N rows and `part` columns, in no order: keys (parts, N, K)."""
    points = (x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd)
    squares = (x_squares, y_squares)
    allow = (mask, stride_mn, stride_mm, row_labels, column_labels)
    affine = (scale, shift, row_factor, column_factor, row_bias, column_bias)
    number = tl.program_id(0) % parts
    i = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = number.to(tl.int64) * part
    last = tl.minimum(first + part, M)
    # What is no pair has keys of its own, so that one of them is replaced at a time.
    best = NONE - tl.arange(0, K).to(tl.int64)[None, :] + tl.zeros((BLOCK_N, K), tl.int64)
    worst = tl.max(best, 1)
    for start in range(first, last, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        u = base_tile(points, squares, (None, 0, 0), i, j, BASE, DIRECT, BLOCK_D, PRECISION)
        v, _ = argument_tile(u, affine, i, j, N, M)
        if LARGEST:
            v = -v
        allowed = allowed_tile(allow, i, j, N, last, SAME, OFF_DIAGONAL)
        key = (ordered_bits(v).to(tl.int64) << 32) | j[None, :]
        key = tl.where(allowed, key, NONE)
        new = tl.min(key, 1)
        while tl.max((new < worst).to(tl.int32)) > 0:
            replaced = (new < worst)[:, None] & (best == worst[:, None])
            best = tl.where(replaced, new[:, None], best)
            key = tl.where(key == new[:, None], NONE, key)
            worst = tl.max(best, 1)
            new = tl.min(key, 1)
    at = (number * N + i)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(keys + at, best, mask=(i < N)[:, None])


@triton.jit
def refine_kernel(
    x,
    y,
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_ym,
    stride_yd,
    scale_high,
    scale_low,
    shift,
    row_factor,
    column_factor,
    bias,
    parameter,
    mask,
    stride_mn,
    stride_mm,
    row_labels,
    column_labels,
    keys,
    margins,
    values,
    indices,
    k,
    fill,
    BASE: tl.constexpr,
    FUNCTION: tl.constexpr,
    SAME: tl.constexpr,
    OFF_DIAGONAL: tl.constexpr,
    LARGEST: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One row: its K candidates in float64, all columns where they may not have the best k."""
    points = (x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd)
    wide = (scale_high, scale_low, row_factor, column_factor, bias)
    allow = (mask, stride_mn, stride_mm, row_labels, column_labels)
    i = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K)
    key = tl.load(keys + i * K + slot)
    worst = tl.max(key, 0)
    exist = key <= NONE - K
    j = tl.where(exist, key & 0x7FFFFFFF, NONE)
    v = exact_argument(points, wide, i, j, exist, BASE, BLOCK_D)
    order = ordered_bits_64(-v if LARGEST else v)
    order = tl.where(exist, order, NONE)
    # The k-th value, with its copies counted as one: no larger than the k-th.
    kth, left = order, NONE - tl.zeros((1,), tl.int64)
    for _ in range(0, k):
        left = tl.min(kth, 0) + tl.zeros((1,), tl.int64)
        kth = tl.where((kth == left) & (slot == tl.min(tl.where(kth == left, slot, K), 0)),
                       NONE, kth)  # fmt: skip
    bound = of_ordered_bits((worst >> 32).to(tl.int32)).to(tl.float64)
    bound = ordered_bits_64(bound - tl.load(margins + i).to(tl.float64))
    certain = (worst > NONE - K) | ((tl.max(left, 0) < bound) & (bound != -(2**63)))
    if not certain:
        order = tl.zeros((K,), tl.int64) + NONE
        j = NONE - slot.to(tl.int64)
        for start in range(0, M, BLOCK_J):
            column = start + tl.arange(0, BLOCK_J).to(tl.int64)
            row = i + tl.zeros((1,), tl.int64)
            allowed = allowed_tile(allow, row, column, N, M, SAME, OFF_DIAGONAL)
            allowed = tl.max(allowed.to(tl.int32), 0) > 0
            w = exact_argument(points, wide, i, column, allowed, BASE, BLOCK_D)
            found = tl.where(allowed, ordered_bits_64(-w if LARGEST else w), NONE)
            smallest, largest = tl.min(found, 0), tl.max(order, 0)
            while smallest < largest:
                at = tl.min(tl.where(found == smallest, column, NONE), 0)
                last = tl.max(tl.where(order == largest, j, 0), 0)
                replaced = (order == largest) & (j == last)
                order = tl.where(replaced, smallest, order)
                j = tl.where(replaced, at, j)
                found = tl.where(column == at, NONE, found)
                smallest, largest = tl.min(found, 0), tl.max(order, 0)
    chosen = tl.zeros((K,), tl.int64) - 1  # the r-th best in slot r
    for r in range(0, k):
        smallest = tl.min(order, 0)
        at = tl.min(tl.where(order == smallest, j, NONE), 0)
        chosen = tl.where((slot == r) & (smallest != NONE), at, chosen)
        order = tl.where((order == smallest) & (j == at), NONE, order)
    exist = chosen >= 0
    v = exact_argument(points, wide, i, tl.where(exist, chosen, 0), exist, BASE, BLOCK_D)
    s = apply_function((v + shift).to(tl.float32), parameter, FUNCTION)
    s = tl.where(exist, s, fill)
    tl.store(values + i * k + slot, rounded(s, values.dtype.element_ty), mask=slot < k)
    tl.store(indices + i * k + slot, chosen, mask=slot < k)


def padded_count(k: int) -> int:
    """Candidates: a power of two, and a few more than k, so that errors seldom reach the k-th."""
    return max(4, triton.next_power_of_2(k + 2))


def margins(problem: Problem, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Bounds of |v in float32 − v| of every row; NaN or infinite where norms are."""
    N, M, D = problem.shape
    size_x = squared_norms(x)[0].sqrt()
    size_y = squared_norms(y)[0].sqrt().nan_to_num(nan=0.0, posinf=torch.inf).amax()
    if problem.base == "dot":
        reach = size_x * size_y
    elif problem.base == "sqeuclidean":
        reach = (size_x + size_y).square()
    else:
        reach = (size_x + size_y) * D**0.5
    reach = reach * abs(problem.scale)
    if problem.row_factor is not None:
        reach = reach * problem.row_factor.abs()
    if problem.column_factor is not None:
        reach = reach * problem.column_factor.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax()
    if bias is not None:
        reach = reach + bias.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax()
    # Each of D products and sums, three parts of a tf32 product, and the steps from u to v.
    return reach * ((D + 16) * 2.0**-22) + 2.0**-126


def parts_of(N: int, M: int, block_n: int, block_m: int) -> int:
    """Parts of the columns, so that few rows use many multiprocessors too."""
    return max(1, min(PROGRAMS // triton.cdiv(N, block_n), triton.cdiv(M, 8 * block_m)))


def pairwise_select(
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    base: str,
    function: str,
    scale: float,
    shift: float,
    parameter: float,
    mask: Tensor | None,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    same: bool,
    off_diagonal: bool,
    k: int,
    largest: bool,
) -> tuple[Tensor, Tensor]:
    """(values (N, k) in the dtype of x, indices (N, k))."""
    (N, D), M = x.shape, y.shape[0]
    fill = -torch.inf if largest else torch.inf
    if N * M == 0:
        return x.new_full((N, k), fill), x.new_full((N, k), -1, dtype=torch.int64)
    values, indices = x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64)
    pair = (base, function, scale, shift, parameter)
    # Whatever is lost by three products in tf32 is found again in float64.
    precision = "tf32x3" if x.dtype == torch.float32 else "ieee"
    problem = problem_of(x, y, row_factor, column_factor, bias, *pair, precision)
    problem = replace(problem, shift=0.0)
    decreasing = function == "exp" or (function == "log_ratio" and parameter < 1)
    kinds = {"LARGEST": largest != decreasing, "K": padded_count(k)}
    kinds |= {"SAME": same, "OFF_DIAGONAL": off_diagonal}
    strides = (0, 0) if mask is None else mask.stride()
    mask_arguments = (mask, *strides, x_labels, y_labels)
    config = configure(TABLE, x.device, "direct" if problem.direct else problem.dtype_class)
    BLOCK_N, BLOCK_M = config.tiles["BLOCK_N"], config.tiles["BLOCK_M"]
    parts = parts_of(N, M, BLOCK_N, BLOCK_M)
    part = triton.cdiv(triton.cdiv(M, parts), BLOCK_M) * BLOCK_M
    keys = x.new_empty(parts, N, kinds["K"], dtype=torch.int64)
    launch(
        candidates_kernel,
        (triton.cdiv(N, BLOCK_N) * parts,),
        config,
        *problem.arguments(),
        *mask_arguments,
        *(keys, part, parts),
        matrix_product=problem.uses_matrix_units(),
        **problem.constants(),
        **kinds,
    )
    if parts > 1:
        keys = keys.transpose(0, 1).reshape(N, -1).topk(kinds["K"], largest=False).values
    high = float(torch.tensor(scale, dtype=torch.float32))
    launch(
        refine_kernel,
        (N,),
        configure(REFINE, x.device),
        *(x, y, N, M, D, *x.stride(), *y.stride(), high, scale - high, float(shift)),
        *(problem.row_factor, problem.column_factor, problem.column_bias, float(parameter)),
        *mask_arguments,
        *(keys, margins(problem, x, y, bias), values, indices, k, fill),
        BASE=problem.constants()["BASE"],
        FUNCTION=problem.constants()["FUNCTION"],
        **kinds,
    )
    return values, indices


def example_launches(dtype: torch.dtype) -> None:
    """Dot products, squares with and without a mask, few dimensions, factors and a bias."""
    x = torch.empty(10_000, 128, dtype=dtype, device="meta")
    y = torch.empty(1_000_000, 128, dtype=dtype, device="meta")
    identity = ("identity", 1.0, 0.0, 0.0)
    none = (None, None, None)
    no_mask = (None, None, None, True, False)
    for base in ("dot", "sqeuclidean"):
        for k in (1, 10, 32):
            pairwise_select(x, y, *none, base, *identity, *no_mask, k, base == "dot")
    factors = [torch.empty(n, device="meta") for n in (10_000, 8192, 8192)]
    mask = torch.empty(10_000, 8192, dtype=torch.bool, device="meta")
    for D in (3, 128):
        x, y = x.new_empty(10_000, D), x.new_empty(8192, D)
        pairwise_select(
            x, y, *factors, "sqeuclidean", "arcosh", 2.0, 0.0, 1.0, mask, *no_mask[1:], 10, False
        )
    labels = [torch.empty(n, dtype=torch.int64, device="meta") for n in (10_000, 8192)]
    pairwise_select(x, y, *none, "l1", *identity, None, *labels, False, True, 10, False)
