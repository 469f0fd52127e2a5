"""Conditional transport on the similarities s (N × M) of each problem, with logarithms of weights:

r_i = Σ_j π_ij s_ij,   π_ij = exp((s_ij − h_i)/τ + β_j)/z_i,      c_j and κ_ij likewise with α_i;
backward, with p = ∂r_i π_ij, q = ∂c_j κ_ij, u = s_ij − r_i, v = s_ij − c_j:
∂s = p + q + (p u + q v)/τ,   ∂β_j = Σ_i p u,   ∂α_i = Σ_j q v,   ∂τ = −Σ (p u² + q v²)/τ².

A program has a block of rows of one problem and goes over its columns by tiles: s is read once.
Rows are summed around the largest similarity so far. What a tile sums for its columns, around the
tile's own maxima, is written and merged by a second kernel in the order of the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, rounded

TABLE = {
    (80, "forward"): Config({"BLOCK_N": 32, "BLOCK_M": 64}, num_warps=4),
    (80, "merge"): Config({"BLOCK_M": 64}, num_warps=2),
    (80, "backward"): Config({"BLOCK_N": 32, "BLOCK_M": 32}, num_warps=4),
}
NONE = tl.constexpr(float("-inf"))
LARGEST_INVERSE = tl.constexpr(1e20)


@triton.jit
def inverse_of(temperature):
    return tl.minimum(1.0 / tl.load(temperature), LARGEST_INVERSE)


@triton.jit
def weights_of(logs, offset, index, count):
    """Logarithms of weights, all 0 where none are given; -infinity from the end on."""
    if logs is None:
        return tl.where(index < count, 0.0, NONE)
    else:
        return tl.load(logs + offset + index, mask=index < count, other=NONE)


@triton.jit
def joined(h, z, t, other_h, other_z, other_t, inverse):
    """Sums around h and around other_h, as sums around the larger; without weights h is NONE."""
    most = tl.maximum(h, other_h)
    step = tl.where(h == NONE, 0.0, h - most)
    other_step = tl.where(other_h == NONE, 0.0, other_h - most)
    scale, other_scale = tl.exp(step * inverse), tl.exp(other_step * inverse)
    total = scale * z + other_scale * other_z
    return most, total, scale * (t + z * step) + other_scale * (other_t + other_z * other_step)


@triton.jit
def store_expectation(mean, stats, at, count, h, z, t, mask):
    """The mean, and h and log z as the two parts of `stats`; all 0 where there is no weight."""
    total = tl.where(z == 0, 1.0, z)
    h = tl.where(h == NONE, 0.0, h)
    tl.store(mean + at, tl.where(z == 0, 0.0, h + t / total), mask=mask)
    tl.store(stats + at, tl.where(z == 0, 0.0, h), mask=mask)
    tl.store(stats + count + at, tl.log(total), mask=mask)


@triton.jit
def forward_kernel(
    similarity,
    log_a,
    log_b,
    temperature,
    row_mean,
    row_stats,
    sums,
    rows,
    N,
    M,
    blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sums: (B, blocks, 3, M) with the maximum, z and Σ e (s − maximum) of the block's columns."""
    inverse = inverse_of(temperature)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    alpha = weights_of(log_a, b * N, i, N)
    row_used = (alpha > NONE)[:, None]
    to = sums + tl.program_id(0).to(tl.int64) * 3 * M
    h = tl.full((BLOCK_N,), NONE, tl.float32)
    z = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, M, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = (i < N)[:, None] & (j < M)[None, :]
        at = similarity + (b * N + i)[:, None] * M + j[None, :]
        s = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        beta = weights_of(log_b, b * M, j, M)
        own = tl.max(tl.where((beta > NONE)[None, :], s, NONE), 1)
        u = s - tl.where(own == NONE, 0.0, own)[:, None]
        e = tl.exp(u * inverse + beta[None, :])
        h, z, t = joined(h, z, t, own, tl.sum(e, 1), tl.sum(e * u, 1), inverse)
        most = tl.max(tl.where(row_used, s, NONE), 0)
        v = s - tl.where(most == NONE, 0.0, most)[None, :]
        f = tl.exp(v * inverse + alpha[:, None])
        tl.store(to + j, most, mask=j < M)
        tl.store(to + M + j, tl.sum(f, 0), mask=j < M)
        tl.store(to + 2 * M + j, tl.sum(f * v, 0), mask=j < M)
    store_expectation(row_mean, row_stats, b * N + i, rows, h, z, t, i < N)


@triton.jit
def merge_kernel(
    sums, temperature, column_mean, column_stats, columns, M, blocks, tiles, BLOCK_M: tl.constexpr
):
    """The sums of all blocks for a tile of columns."""
    inverse = inverse_of(temperature)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    j = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.full((BLOCK_M,), NONE, tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    t = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(0, blocks):
        at = sums + (b * blocks + block) * 3 * M + j
        own = tl.load(at, mask=j < M, other=NONE)
        own_z = tl.load(at + M, mask=j < M, other=0.0)
        own_t = tl.load(at + 2 * M, mask=j < M, other=0.0)
        h, z, t = joined(h, z, t, own, own_z, own_t, inverse)
    store_expectation(column_mean, column_stats, b * M + j, columns, h, z, t, j < M)


@triton.jit
def backward_kernel(
    similarity,
    grad_row,
    grad_column,
    log_a,
    log_b,
    temperature,
    row_mean,
    column_mean,
    row_stats,
    column_stats,
    grad_similarity,
    grad_alpha,
    of_beta,
    of_temperature,
    rows,
    columns,
    N,
    M,
    blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """of_beta: (B, blocks, M), of_temperature: (B, blocks)."""
    inverse = inverse_of(temperature)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = b * N + i
    alpha = weights_of(log_a, b * N, i, N)[:, None]
    of_row = tl.load(grad_row + row, mask=i < N, other=0.0)[:, None]
    mean = tl.load(row_mean + row, mask=i < N, other=0.0)[:, None]
    largest = tl.load(row_stats + row, mask=i < N, other=0.0)[:, None]
    log_total = tl.load(row_stats + rows + row, mask=i < N, other=0.0)[:, None]
    of_alpha = tl.zeros((BLOCK_N,), tl.float32)
    bend = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, M, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M).to(tl.int64)
        at = b * M + j
        beta = weights_of(log_b, b * M, j, M)[None, :]
        of_column = tl.load(grad_column + at, mask=j < M, other=0.0)[None, :]
        column = tl.load(column_mean + at, mask=j < M, other=0.0)[None, :]
        most = tl.load(column_stats + at, mask=j < M, other=0.0)[None, :]
        column_total = tl.load(column_stats + columns + at, mask=j < M, other=0.0)[None, :]
        inside = (i < N)[:, None] & (j < M)[None, :]
        place = row[:, None] * M + j[None, :]
        s = tl.load(similarity + place, mask=inside, other=0.0).to(tl.float32)
        p = of_row * tl.exp((s - largest) * inverse + (beta - log_total))
        q = of_column * tl.exp((s - most) * inverse + (alpha - column_total))
        u, v = s - mean, s - column
        pu, qv = p * u, q * v
        of_s = rounded(p + q + (pu + qv) * inverse, grad_similarity.dtype.element_ty)
        tl.store(grad_similarity + place, of_s, mask=inside)
        to = of_beta + tl.program_id(0).to(tl.int64) * M + j
        tl.store(to, tl.sum(tl.where(inside, pu, 0.0), 0), mask=j < M)
        of_alpha += tl.sum(tl.where(inside, qv, 0.0), 1)
        bend += tl.sum(tl.where(inside, pu * u + qv * v, 0.0), 1)
    if grad_alpha is not None:
        tl.store(grad_alpha + row, of_alpha, mask=i < N)
    tl.store(of_temperature + tl.program_id(0), -(tl.sum(bend, 0) * inverse) * inverse)


def conditional_transport(
    similarity: Tensor, log_a: Tensor | None, log_b: Tensor | None, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r (B, N), c (B, M), (h, log z) of rows (2, B, N), (h, log z) of columns (2, B, M))."""
    B, N, M = similarity.shape
    shapes = ((B, N), (B, M), (2, B, N), (2, B, M))
    results = [similarity.new_empty(shape, dtype=torch.float32) for shape in shapes]
    if B * N * M == 0:
        return tuple(result.zero_() for result in results)
    row_mean, column_mean, row_stats, column_stats = results
    config = configure(TABLE, similarity.device, "forward")
    blocks = triton.cdiv(N, config.tiles["BLOCK_N"])
    sums = similarity.new_empty(B, blocks, 3, M, dtype=torch.float32)
    operands = (similarity, log_a, log_b, temperature, row_mean, row_stats, sums)
    launch(forward_kernel, (B * blocks,), config, *operands, B * N, N, M, blocks)
    config = configure(TABLE, similarity.device, "merge")
    tiles = triton.cdiv(M, config.tiles["BLOCK_M"])
    operands = (sums, temperature, column_mean, column_stats)
    launch(merge_kernel, (B * tiles,), config, *operands, B * M, M, blocks, tiles)
    return tuple(results)


def conditional_transport_backward(
    similarity: Tensor,
    grad_row: Tensor,
    grad_column: Tensor,
    log_a: Tensor | None,
    log_b: Tensor | None,
    temperature: Tensor,
    row_mean: Tensor,
    column_mean: Tensor,
    row_stats: Tensor,
    column_stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(∂s, ∂α, ∂β, ∂τ); those of weights that are not given have size 0."""
    B, N, M = similarity.shape
    grad_similarity = similarity.new_empty(B, N, M)
    grad_alpha = grad_row.new_zeros(0 if log_a is None else (B, N))
    if B * N * M == 0:
        grad_beta = grad_row.new_zeros(0 if log_b is None else (B, M))
        return grad_similarity, grad_alpha, grad_beta, temperature.new_zeros(())
    config = configure(TABLE, similarity.device, "backward")
    blocks = triton.cdiv(N, config.tiles["BLOCK_N"])
    of_beta = grad_row.new_empty(B, blocks, M)
    of_temperature = grad_row.new_empty(B, blocks)
    operands = (
        *(similarity, grad_row, grad_column, log_a, log_b, temperature),
        *(row_mean, column_mean, row_stats, column_stats),
        *(grad_similarity, None if log_a is None else grad_alpha, of_beta, of_temperature),
    )
    launch(backward_kernel, (B * blocks,), config, *operands, B * N, B * M, N, M, blocks)
    grad_beta = grad_row.new_empty(0) if log_b is None else of_beta.sum(1)
    return grad_similarity, grad_alpha, grad_beta, of_temperature.sum()


def example_launches(dtype: torch.dtype) -> None:
    """Patches and labels, with weights and without, and the shapes that specialise differently."""
    for B, N, M, weighted in ((64, 196, 80, False), (64, 196, 500, True), (1, 1000, 1001, True)):
        make = lambda *shape, d=torch.float32: torch.empty(*shape, dtype=d, device="meta")  # noqa: E731
        s, temperature = make(B, N, M, d=dtype), make(())
        logs = (make(B, N), make(B, M)) if weighted else (None, None)
        results = conditional_transport(s, *logs, temperature)
        grads = make(B, N), make(B, M)
        conditional_transport_backward(s, *grads, *logs, temperature, *results)
