"""Soft minima over points, s_i = −ε log Σ_j w_j e^((g_j − c_ij) / ε).

A program has a block of rows and goes over the tiles of its part of the columns, with each row's
largest g_j − c_ij so far and the sum around it. That is subtracted before the division by ε, where
it is exact. Several parts are merged in their order by a second kernel.

Source of the form: FlashAttention's running maximum (Dao et al., NeurIPS 2022, algorithm 1), with
costs in place of scores and nothing to multiply by.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch
from weft.triton_kernels.transport.points import (
    INFINITY,
    cost_tile,
    example_arguments,
    first_rows,
    parts_of,
    problem_of,
)
from weft.triton_kernels.transport.problem import inverse_of, sizes_of

COUNT = 7  # arguments that the ops on points share
TABLE = {
    (80, "direct"): Config({"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 16}, num_warps=8),
    (80, "ieee"): Config({"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_D": 16}, num_warps=4),
    (80, "units"): Config({"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_D": 32}, num_warps=8),
    (90, "units"): Config({"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32}, num_warps=8),
    (80, "merge"): Config({"BLOCK_N": 128}, num_warps=4),
}


@triton.jit
def scaled_exp(gap, near, rest):
    """e^(gap / ε) with 1/ε as a sum of two numbers; 0 of −∞."""
    return tl.exp(gap * near + gap * rest)


@triton.jit
def joined(top, total, other_top, other_total, near, rest):
    """Sums around `top` and around `other_top` as one around the larger; −∞: of nothing."""
    most = tl.maximum(top, other_top)
    safe = tl.where(most == -INFINITY, 0.0, most)
    total = total * scaled_exp(top - safe, near, rest)
    return most, total + other_total * scaled_exp(other_top - safe, near, rest)


@triton.jit
def soft_minimum(top, total, eps):
    """+∞ where nothing is summed."""
    none = total == 0
    log_total = tl.log(tl.where(none, 1.0, total))
    return tl.where(none, INFINITY, -eps * log_total - tl.where(none, 0.0, top))


@triton.jit
def softmin_kernel(
    out,
    sums,
    p,
    g,
    weight,
    parts,
    width,
    COST: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (B, N); of several parts of `width` columns, the largest and the sum, (B, parts, 2, N)"""
    blocks = tl.cdiv(p.N, BLOCK_N)
    part = (tl.program_id(0) % parts).to(tl.int64)
    block = (tl.program_id(0) // parts % blocks).to(tl.int64)
    z = (tl.program_id(0) // parts // blocks).to(tl.int64)
    n, m = sizes_of(p, z)
    i = block * BLOCK_N + tl.arange(0, BLOCK_N)
    eps = tl.load(p.epsilon + z)
    near, rest = inverse_of(eps)
    first, squares = first_rows(p, z, i, n, DEPTH, BLOCK_D)
    total = tl.zeros((BLOCK_N,), tl.float32)
    top = total - INFINITY
    stop = tl.where(block * BLOCK_N < n, tl.minimum((part + 1) * width, m), 0)
    for start in range(part * width, stop, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        w = tl.load(weight + z * p.M + j, mask=j < m, other=0.0)
        g_j = tl.load(g + z * p.M + j, mask=j < m, other=0.0)
        g_j = tl.where(w == 0, -INFINITY, g_j)
        c = cost_tile(
            p, z, i, j, n, m, first, squares, COST, DEPTH, WHOLE, PRECISION, BLOCK_D
        )  # fmt: skip
        v = g_j[None, :] - c
        most = tl.maximum(top, tl.max(v, 1))
        safe = tl.where(most == -INFINITY, 0.0, most)
        here = tl.sum(w[None, :] * scaled_exp(v - safe[:, None], near, rest), 1)
        total = total * scaled_exp(top - safe, near, rest) + here
        top = most
    total = tl.where(i < n, total, 0.0)
    if sums is None:
        tl.store(out + z * p.N + i, soft_minimum(top, total, eps), mask=i < p.N)
    else:
        at = sums + (z * parts + part) * 2 * p.N + i
        tl.store(at, top, mask=i < p.N)
        tl.store(at + p.N, total, mask=i < p.N)


@triton.jit
def merge_kernel(out, sums, epsilon, parts, N, BLOCK_N: tl.constexpr):
    """The soft minima of all parts."""
    blocks = tl.cdiv(N, BLOCK_N)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    eps = tl.load(epsilon + z)
    near, rest = inverse_of(eps)
    total = tl.zeros((BLOCK_N,), tl.float32)
    top = total - INFINITY
    for part in range(0, parts):
        at = sums + (z * parts + part) * 2 * N + i
        other_top = tl.load(at, mask=i < N, other=-INFINITY)
        other_total = tl.load(at + N, mask=i < N, other=0.0)
        top, total = joined(top, total, other_top, other_total, near, rest)
    tl.store(out + z * N + i, soft_minimum(top, total, eps), mask=i < N)


def points_softmin(*args) -> Tensor:
    """(B, N)"""
    g, weight = args[COUNT:]
    problem = problem_of(*args[:COUNT])
    p, config = problem.points, configure(TABLE, g.device, problem.route)
    B = g.shape[0]
    out = g.new_empty(B, p.N)
    if out.numel() == 0:
        return out
    programs = B * triton.cdiv(p.N, config.tiles["BLOCK_N"])
    parts, width = parts_of(programs, p.M, config.tiles["BLOCK_M"])
    sums = None if parts == 1 else g.new_empty(B, parts, 2, p.N)
    launch(
        *(softmin_kernel, (programs * parts,), config),
        *(out, sums, p, g.contiguous(), weight.contiguous(), parts, width),
        matrix_product=problem.uses_matrix_units(),
        **problem.constants(config),
    )
    if sums is not None:
        config = configure(TABLE, g.device, "merge")
        grid = (B * triton.cdiv(p.N, config.tiles["BLOCK_N"]),)
        launch(merge_kernel, grid, config, out, sums, p.epsilon, parts, p.N)
    return out


def example_launches(dtype: torch.dtype) -> None:
    """The points are always float32."""
    for args in example_arguments():
        potentials = args[1].new_empty(args[1].shape[:2])
        points_softmin(*args, potentials, potentials)
