"""Tiles of a pair function, for whatever reduces them:

    v_ij = scale · α_i · β_j · u_ij + bias + shift,   s_ij = f(v_ij),   and the slope f'(v_ij)

of u_ij = ⟨x_i, y_j⟩, ‖x_i − y_j‖² or ‖x_i − y_j‖₁; weft.reference.pairwise.pairs says it in
PyTorch.

Two ways to a tile of u. By products: the matrix units, in a loop over D; squared distances are
‖x‖² + ‖y‖² − 2⟨x, y⟩ of float32 points moved by the mean of y, and where a tile has pairs so close
that the digits cancel all the same, they are computed again by differences. Directly: differences,
one coordinate at a time, for few dimensions and for ‖·‖₁.

A kernel takes a problem as the arguments that `Problem.arguments` lists, and makes them one tuple.
Problems are symmetric: `Problem.swapped` has the columns as rows.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, float32_precision, launch, operand

DOT, SQUARED, L1 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
IDENTITY, ROOT, EXP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG_RATIO, ARCOSH = tl.constexpr(3), tl.constexpr(4)
BASES = {"dot": 0, "sqeuclidean": 1, "l1": 2}
FUNCTIONS = {"identity": 0, "root": 1, "exp": 2, "log_ratio": 3, "arcosh": 4}

DIRECT_UP_TO = 8  # dimensions
SQUARES = {(80,): Config({"BLOCK_N": 16, "BLOCK_D": 128}, num_warps=4)}


@triton.jit
def squares_kernel(
    x, center, moved, out, N, D, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """‖x_i − center‖² in float32, and x − center if there is one: a block of rows per program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = (i[:, None] < N) & (d[None, :] < D)
        at = x + i[:, None] * stride_n + d[None, :] * stride_d
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if center is not None:
            values -= tl.load(center + d, mask=d < D, other=0.0)[None, :]
            tl.store(moved + i[:, None] * D + d[None, :], values, mask=inside)
        total += tl.sum(values * values, 1)
    tl.store(out + i, total, mask=i < N)


@triton.jit
def product_tile(points, i, j, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """⟨x_i, y_j⟩ by the matrix units: a loop over D. Rows that do not exist count as zeros."""
    x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd = points
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    x_tile = x + i[:, None] * stride_xn + d[None, :] * stride_xd
    y_tile = y + j[None, :] * stride_ym + d[:, None] * stride_yd
    u = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        left = d < D - start
        x_values = tl.load(x_tile, mask=(i[:, None] < N) & left[None, :], other=0.0)
        y_values = tl.load(y_tile, mask=(j[None, :] < M) & left[:, None], other=0.0)
        u = tl.dot(operand(x_values), operand(y_values), u, input_precision=PRECISION)
        x_tile += BLOCK_D * stride_xd
        y_tile += BLOCK_D * stride_yd
    return u


@triton.jit
def direct_tile(points, i, j, BASE: tl.constexpr):
    """u_ij from one coordinate after the other."""
    x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd = points
    x_row, y_row = x + i * stride_xn, y + j * stride_ym
    u = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for _ in range(0, D):
        a = tl.load(x_row, mask=i < N, other=0.0).to(tl.float32)[:, None]
        b = tl.load(y_row, mask=j < M, other=0.0).to(tl.float32)[None, :]
        if BASE == DOT:
            u += a * b
        elif BASE == SQUARED:
            u += (a - b) * (a - b)
        else:
            u += tl.abs(a - b)
        x_row += stride_xd
        y_row += stride_yd
    return u


@triton.jit
def base_tile(
    points,
    squares,
    given,
    i,
    j,
    BASE: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u_ij of a tile; of rows and columns that do not exist, anything.

    ``given`` is (products of a block, its first row and column), or begins with None.
    """
    if DIRECT:
        u = direct_tile(points, i, j, BASE)
    else:
        N, M = points[2], points[3]
        products, first_i, first_j = given
        if products is not None:
            at = products + (i - first_i)[:, None] * (M - first_j) + (j - first_j)[None, :]
            u = tl.load(at, mask=(i < N)[:, None] & (j < M)[None, :], other=0.0)
        else:
            u = product_tile(points, i, j, BLOCK_D, PRECISION)
        if BASE == SQUARED:
            x_squares, y_squares = squares
            # Below 1/128 of the sum seven bits are lost. A NaN comes here too: of an infinity.
            sums = tl.load(x_squares + i, mask=i < N, other=1.0)[:, None]
            sums = sums + tl.load(y_squares + j, mask=j < M, other=1.0)[None, :]
            u = sums - 2 * u
            close = ~(u > sums / 128) & (i < N)[:, None] & (j < M)[None, :]
            if tl.max(close.to(tl.int32)) > 0:
                u = tl.where(close, direct_tile(points, i, j, BASE), u)
    return u


@triton.jit
def argument_tile(u, affine, i, j, N, M):
    """(v, ∂v/∂u) of a tile of u."""
    scale, shift, row_factor, column_factor, row_bias, column_bias = affine
    rate = tl.zeros(u.shape, tl.float32) + scale
    if row_factor is not None:
        rate *= tl.load(row_factor + i, mask=i < N, other=1.0)[:, None]
    if column_factor is not None:
        rate *= tl.load(column_factor + j, mask=j < M, other=1.0)[None, :]
    v = rate * u
    if row_bias is not None:
        v += tl.load(row_bias + i, mask=i < N, other=0.0)[:, None]
    if column_bias is not None:
        v += tl.load(column_bias + j, mask=j < M, other=0.0)[None, :]
    return v + shift, rate


@triton.jit
def log1p(w):
    """log(1 + w) with the digits of w: by 2 artanh(w / (2 + w)) where 1 + w would round them."""
    t = w / (2 + w)
    square = t * t
    series = 1.0 / 9 + square * (1.0 / 11)
    series = 1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * series)))
    return tl.where(tl.abs(w) < 0.5, 2 * t * series, tl.log(1 + w))


@triton.jit
def apply_function(v, parameter, FUNCTION: tl.constexpr):
    if FUNCTION == IDENTITY:
        s = v
    elif FUNCTION == EXP:
        s = tl.exp(-v)
    elif FUNCTION == LOG_RATIO:
        s = log1p((1 - parameter) / (v + parameter))
    else:
        safe = tl.where(v <= 0, 1.0, v)
        if FUNCTION == ROOT:
            s = tl.sqrt_rn(safe)
        else:
            s = parameter * log1p(safe + tl.sqrt_rn(safe * (safe + 2)))
        s = tl.where(v <= 0, 0.0, s)
    return s


@triton.jit
def slope(v, parameter, FUNCTION: tl.constexpr):
    """f'(v), 0 at v = 0 where f has none."""
    if FUNCTION == IDENTITY:
        result = tl.zeros(v.shape, tl.float32) + 1.0
    elif FUNCTION == EXP:
        result = -tl.exp(-v)
    elif FUNCTION == LOG_RATIO:
        result = (parameter - 1) / ((v + 1) * (v + parameter))
    else:
        safe = tl.where(v <= 0, 1.0, v)
        if FUNCTION == ROOT:
            result = 0.5 / tl.sqrt_rn(safe)
        else:
            result = parameter / tl.sqrt_rn(safe * (safe + 2))
        result = tl.where(v <= 0, 0.0, result)
    return result


@dataclass(frozen=True)
class Problem:
    """Rows x (N, D) and columns y (M, D) of any strides, with their pair function."""

    x: Tensor
    y: Tensor
    base: str
    function: str = "identity"
    scale: float = 1.0
    shift: float = 0.0
    parameter: float = 0.0
    row_factor: Tensor | None = None
    column_factor: Tensor | None = None
    row_bias: Tensor | None = None
    column_bias: Tensor | None = None
    x_squares: Tensor | None = None
    y_squares: Tensor | None = None
    precision: str = "ieee"
    direct: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.shape[0], self.y.shape[0], self.x.shape[1]

    @property
    def dtype_class(self) -> str:
        return "float" if self.x.dtype == torch.float32 else "half"

    def uses_matrix_units(self) -> bool:
        return not self.direct and (self.dtype_class == "half" or self.precision != "ieee")

    def arguments(self) -> tuple:
        """In the order of a kernel's arguments: points, squares, scale and what goes with it."""
        return (
            *(self.x, self.y, *self.shape, *self.x.stride(), *self.y.stride()),
            *(self.x_squares, self.y_squares, float(self.scale), float(self.shift)),
            *(self.row_factor, self.column_factor, self.row_bias, self.column_bias),
            float(self.parameter),
        )

    def constants(self) -> dict:
        return {
            "BASE": BASES[self.base],
            "FUNCTION": FUNCTIONS[self.function],
            "DIRECT": self.direct,
            "PRECISION": self.precision,
        }

    def swapped(self) -> "Problem":
        return replace(
            self,
            x=self.y,
            y=self.x,
            row_factor=self.column_factor,
            column_factor=self.row_factor,
            row_bias=self.column_bias,
            column_bias=self.row_bias,
            x_squares=self.y_squares,
            y_squares=self.x_squares,
        )


def squared_norms(x: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(‖x_i − center‖² in float32, x − center); without a center, x itself."""
    N, D = x.shape
    out = x.new_empty(N, dtype=torch.float32)
    moved = None if center is None else x.new_empty(N, D)
    config = configure(SQUARES, x.device)
    if N:
        grid = (triton.cdiv(N, config.tiles["BLOCK_N"]),)
        launch(squares_kernel, grid, config, x, center, moved, out, N, D, *x.stride())
    return out, x if moved is None else moved


def problem_of(
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None = None,
    column_factor: Tensor | None = None,
    bias: Tensor | None = None,
    base: str = "dot",
    function: str = "identity",
    scale: float = 1.0,
    shift: float = 0.0,
    parameter: float = 0.0,
    precision: str | None = None,
    direct: bool = False,
) -> Problem:
    """The problem of an op's arguments, with the norms and moved points that its plan needs."""
    contiguous = lambda t: None if t is None else t.contiguous()  # noqa: E731
    problem = Problem(
        *(x, y, base, function, scale, shift, parameter),
        *(contiguous(row_factor), contiguous(column_factor), None, contiguous(bias)),
        precision=precision or float32_precision(),
        direct=direct or base == "l1" or x.shape[1] <= DIRECT_UP_TO,
    )
    if problem.direct or base != "sqeuclidean":
        return problem
    center = None
    if x.dtype == torch.float32 and y.shape[0]:  # half precision would lose digits by being moved
        center = torch.where(y.abs() < 1e15, y, 0).mean(0)
    x_squares, x = squared_norms(x, center)
    y_squares, y = squared_norms(y, center)
    return replace(problem, x=x, y=y, x_squares=x_squares, y_squares=y_squares)


def example_launches(dtype: torch.dtype) -> None:
    x = torch.empty(4096, 512, dtype=dtype, device="meta")
    squared_norms(x)
    if dtype == torch.float32:
        squared_norms(x, x.new_empty(512))
