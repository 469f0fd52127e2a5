"""Doubly stochastic matrices of any size, by sums over rows and over columns:

    Q_ij = u_i v_j K_ij,   K_ij = exp(x_ij / epsilon + F_i + G_j),   u_i = 1 / Σ_j K_ij v_j,
    v_j = 1 / Σ_i u_i K_ij

F and G, integers, are shifts by the largest exponent of each row and column. K is computed anew in
every pass, in tiles: a program has some rows and all columns, or a chunk of rows and some columns,
whose sums are added up in a fixed order. The backward is made of the same sums
(docs/transport/doubly_stochastic.md); small matrices have kernels of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch, rounded
from weft.triton_kernels.transport import doubly_stochastic_small as small
from weft.triton_kernels.transport.doubly_stochastic_small import temperature

ROWS = {(80,): Config({"BLOCK_N": 4, "BLOCK_M": 512}, num_warps=4)}
COLUMNS = {(80,): Config({"BLOCK_N": 16, "BLOCK_M": 128}, num_warps=4)}
TILES = {(80,): Config({"BLOCK_N": 8, "BLOCK_M": 256}, num_warps=4)}
CHUNKS, LEAST_CHUNK = 32, 64


@triton.jit
def _shifted(x, row_shift, column_shift, b, i, j, N, M, high, low):
    """x / epsilon + F + G of a tile, −inf outside."""
    inside = (i < N)[:, None] & (j < M)[None, :]
    at = x + (b * N + i)[:, None] * M + j[None, :]
    s = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
    f = tl.load(row_shift + b * N + i, mask=i < N, other=0.0)
    g = tl.load(column_shift + b * M + j, mask=j < M, other=0.0)
    return s * low + (s * high + (f[:, None] + g[None, :]))


@triton.jit
def _upstream(grad, b, i, j, N, M):
    inside = (i < N)[:, None] & (j < M)[None, :]
    at = grad + (b * N + i)[:, None] * M + j[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def row_kernel(
    x,
    grad,
    row_shift,
    column_shift,
    weights,
    out,
    N,
    M,
    high,
    low,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Σ_j K_ij w_j, or Σ_j g_ij K_ij w_j, or the largest exponent of a row."""
    tiles = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if LARGEST:
        total -= float("inf")
    for first in range(0, M, BLOCK_M):
        j = first + tl.arange(0, BLOCK_M).to(tl.int64)
        y = _shifted(x, row_shift, column_shift, b, i, j, N, M, high, low)
        if LARGEST:
            total = tl.maximum(total, tl.max(y, 1))
        else:
            w = tl.load(weights + b * M + j, mask=j < M, other=0.0)
            k = tl.exp(y) * w[None, :]
            if grad is not None:
                k *= _upstream(grad, b, i, j, N, M)
            total += tl.sum(k, 1)
    tl.store(out + b * N + i, total, mask=i < N)


@triton.jit
def column_kernel(
    x,
    grad,
    means,
    row_shift,
    column_shift,
    weights,
    out,
    N,
    M,
    chunk,
    chunks,
    high,
    low,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of a chunk of rows: Σ_i w_i K_ij, or Σ_i w_i (g_ij − m_i) K_ij, or the largest exponent."""
    tiles = tl.cdiv(M, BLOCK_M)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    b, c = part // chunks, part % chunks
    j = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if LARGEST:
        total -= float("inf")
    last = tl.minimum(N, (c + 1) * chunk)
    for first in range(c * chunk, last, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N).to(tl.int64)
        y = _shifted(x, row_shift, column_shift, b, i, j, N, M, high, low)
        if LARGEST:
            total = tl.maximum(total, tl.max(tl.where((i < last)[:, None], y, -float("inf")), 0))
        else:
            w = tl.load(weights + b * N + i, mask=i < last, other=0.0)
            k = tl.exp(y) * w[:, None]
            if grad is not None:
                m = tl.load(means + b * N + i, mask=i < last, other=0.0)
                k *= _upstream(grad, b, i, j, N, M) - m[:, None]
            total += tl.sum(tl.where((i < last)[:, None], k, 0.0), 0)
    tl.store(out + part * M + j, total, mask=j < M)


@triton.jit
def write_kernel(
    x,
    grad,
    row_shift,
    column_shift,
    u,
    v,
    row_terms,
    row_factors,
    column_terms,
    column_factors,
    out,
    B,
    N,
    M,
    iterations,
    high,
    low,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """u_i v_j K_ij, or (K_ij / epsilon) (g_ij u_i v_j − Σ_t (a_ti d_tj + b_ti c_tj))."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_m
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    i = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column = b * N + i, b * M + j
    k = tl.exp(_shifted(x, row_shift, column_shift, b, i, j, N, M, high, low))
    scale_row = tl.load(u + row, mask=i < N, other=0.0)
    scale_column = tl.load(v + column, mask=j < M, other=0.0)
    value = scale_row[:, None] * scale_column[None, :]
    if grad is not None:
        value *= _upstream(grad, b, i, j, N, M)
        matrices = B + tl.zeros((1,), tl.int64)
        of_row, of_column = row, column
        for _ in range(iterations):
            a = tl.load(row_terms + of_row, mask=i < N, other=0.0)
            f = tl.load(row_factors + of_row, mask=i < N, other=0.0)
            c = tl.load(column_terms + of_column, mask=j < M, other=0.0)
            d = tl.load(column_factors + of_column, mask=j < M, other=0.0)
            value -= a[:, None] * d[None, :] + f[:, None] * c[None, :]
            of_row += matrices * N
            of_column += matrices * M
        value *= high
    inside = (i < N)[:, None] & (j < M)[None, :]
    at = out + row[:, None] * M + j[None, :]
    tl.store(at, rounded(value * k, out.dtype.element_ty), mask=inside)


class _Sums:
    """The sums of K of matrices x (B, N, M), whose shifts are found at the beginning."""

    def __init__(self, x: Tensor, epsilon: float, last_rows: bool):
        self.x, (self.B, self.N, self.M) = x, x.shape
        self.high, self.low = temperature(epsilon)
        self.chunk = max(LEAST_CHUNK, triton.cdiv(self.N, CHUNKS))
        self.chunks = triton.cdiv(self.N, self.chunk)
        self.F = torch.zeros(self.B, self.N, dtype=torch.float32, device=x.device)
        self.G = torch.zeros(self.B, self.M, dtype=torch.float32, device=x.device)
        if last_rows:
            self.G = shift(self.columns(None, largest=True))
            self.F = shift(self.rows(None, largest=True))
        else:
            self.F = shift(self.rows(None, largest=True))
            self.G = shift(self.columns(None, largest=True))

    def rows(self, weights: Tensor | None, grad: Tensor | None = None, largest=False) -> Tensor:
        out = torch.empty_like(self.F)
        config = configure(ROWS, self.x.device)
        launch(
            row_kernel,
            (self.B * triton.cdiv(self.N, config.tiles["BLOCK_N"]),),
            config,
            *(self.x, grad, self.F, self.G, weights, out, self.N, self.M, self.high, self.low),
            LARGEST=largest,
        )
        return out

    def columns(
        self, weights: Tensor | None, grad: Tensor | None = None, means=None, largest=False
    ) -> Tensor:
        parts = self.G.new_empty(self.B, self.chunks, self.M)
        config = configure(COLUMNS, self.x.device)
        launch(
            column_kernel,
            (self.B * self.chunks * triton.cdiv(self.M, config.tiles["BLOCK_M"]),),
            config,
            *(self.x, grad, means, self.F, self.G, weights, parts, self.N, self.M),
            *(self.chunk, self.chunks, self.high, self.low),
            LARGEST=largest,
        )
        return parts.amax(1) if largest else parts.sum(1)

    def write(self, u: Tensor, v: Tensor, grad: Tensor | None = None, terms=(None,) * 4) -> Tensor:
        out = self.x.new_empty(self.x.shape)
        config = configure(TILES, out.device)
        rows, columns = (
            triton.cdiv(n, config.tiles[name])
            for n, name in ((self.N, "BLOCK_N"), (self.M, "BLOCK_M"))
        )
        iterations = len(terms[0]) if grad is not None else 0
        launch(
            write_kernel,
            (self.B * rows * columns,),
            config,
            *(self.x, grad, self.F, self.G, u, v, *terms, out, self.B, self.N, self.M),
            *(iterations, self.high, self.low),
        )
        return out

    def iterate(self, iterations: int, last_rows: bool) -> tuple[list[Tensor], list[Tensor]]:
        """u and v of every iteration, the one that a normalisation of rows or columns begins with
        at place 0."""
        u, v = [torch.exp(-self.F)], [torch.exp(-self.G)]
        for _ in range(iterations):
            if last_rows:
                v.append(reciprocal(self.columns(u[-1])))
                u.append(reciprocal(self.rows(v[-1])))
            else:
                u.append(reciprocal(self.rows(v[-1])))
                v.append(reciprocal(self.columns(u[-1])))
        return u, v


def shift(largest: Tensor) -> Tensor:
    """An integer; 0 for a line without entries."""
    return torch.where(largest == -torch.inf, 0, -largest.round())


def reciprocal(sums: Tensor) -> Tensor:
    return torch.where(sums == 0, 0, 1 / sums)


def doubly_stochastic(
    scores: Tensor, epsilon: float, iterations: int, last_rows: bool, stabilizer: float
) -> Tensor:
    scores = scores.contiguous()
    if not scores.numel():
        return scores.new_empty(scores.shape)
    if max(scores.shape[1:]) <= small.UP_TO:
        return small.doubly_stochastic(scores, epsilon, iterations, last_rows, stabilizer)
    sums = _Sums(scores, epsilon, last_rows)
    u, v = sums.iterate(iterations, last_rows)
    return sums.write(u[-1], v[-1])


def doubly_stochastic_backward(
    grad: Tensor,
    scores: Tensor,
    epsilon: float,
    iterations: int,
    last_rows: bool,
    stabilizer: float,
) -> Tensor:
    scores, grad = scores.contiguous(), grad.contiguous()
    if not scores.numel():
        return scores.new_empty(scores.shape)
    if max(scores.shape[1:]) <= small.UP_TO:
        options = epsilon, iterations, last_rows, stabilizer
        return small.doubly_stochastic_backward(grad, scores, *options)
    sums = _Sums(scores, epsilon, last_rows)
    u, v = sums.iterate(iterations, last_rows)
    mean = u[-1] * sums.rows(v[-1], grad)
    if last_rows:
        of_rows = [mean * u[-1]]
        of_columns = [v[-1].square() * sums.columns(u[-1], grad, mean)]
        for t in range(iterations - 1, 0, -1):
            of_rows.append(-u[t].square() * sums.rows(of_columns[-1]))
            of_columns.append(-v[t].square() * sums.columns(of_rows[-1]))
        factors = u[:-1], v[1:]
    else:
        of_rows = []
        of_columns = [v[-1].square() * sums.columns(u[-1], grad, torch.zeros_like(mean))]
        for t in range(iterations, 0, -1):
            of_rows.append(u[t] * (mean - u[t] * sums.rows(of_columns[-1])))
            mean = torch.zeros_like(mean)
            if t > 1:
                of_columns.append(-v[t - 1].square() * sums.columns(of_rows[-1]))
        factors = u[1:], v[:-1]
    of_rows.reverse()
    of_columns.reverse()
    terms = of_rows, factors[0], of_columns, factors[1]
    return sums.write(u[-1], v[-1], grad, tuple(map(torch.stack, terms)))


def example_launches(dtype: torch.dtype) -> None:
    """Assignments to prototypes, and to a batch."""
    make = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    for shape in ((1, 3840, 3000), (64, 256, 256)):
        x = make(*shape)
        doubly_stochastic(x, 0.05, 3, True, 0.0)
        doubly_stochastic_backward(x, x, 0.05, 3, False, 0.0)
