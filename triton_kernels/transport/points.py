"""Tiles of costs between points, c_ij = c(x_i, y_j), for whatever reduces them, and their matrix.

Up to 8 coordinates are compared by their differences. More go through products,
‖x‖² + ‖y‖² − 2⟨x, y⟩ of points near the origin, to which the caller moves them; a tile with pairs
so close that the digits cancel all the same has these computed again by their differences.

A problem is seen without what lies beyond its lengths. With x and y in each other's place it is the
transposed one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch
from weft.triton_kernels.transport.problem import whole

SQUARED, DISTANCE, DOT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COSTS = {"sqeuclidean": 0, "euclidean": 1, "cosine": 2, "dot": 2}
PRECISIONS = {"fp32": "ieee", "tf32x3": "tf32x3", "tf32": "tf32"}
INFINITY = tl.constexpr(float("inf"))
FEW = 8  # coordinates, for differences
LEAST_TILES = 8  # of columns, for one program
PROGRAMS = 512  # that keep a card busy

TABLE = {
    (80, "matrix", "direct"): Config({"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 16}, num_warps=8),
    (80, "matrix", "ieee"): Config({"BLOCK_N": 32, "BLOCK_M": 64, "BLOCK_D": 16}, num_warps=8),
    (80, "squares"): Config({"BLOCK_N": 32, "BLOCK_D": 64}, num_warps=4),
}


class Points(NamedTuple):
    """Of every op on points, as the kernels take them; None for what is absent. All contiguous."""

    x: object  # (B, N, D)
    y: object  # (B, M, D)
    x_squares: object  # ‖x‖² (B, N), where products need it
    y_squares: object
    epsilon: object  # (B,)
    rows: object
    columns: object
    N: object
    M: object
    D: object
    shift: object  # of −⟨x, y⟩: 1.0 for cosines


@dataclass(frozen=True)
class Problem:
    """A call's points, and what the compiler fixes for them."""

    points: Points
    cost: int
    precision: str
    direct: bool

    def swapped(self) -> "Problem":
        p = self.points
        swapped = Points(
            *(p.y, p.x, p.y_squares, p.x_squares, p.epsilon, p.columns, p.rows),
            *(p.M, p.N, p.D, p.shift),
        )
        return Problem(swapped, self.cost, self.precision, self.direct)

    @property
    def route(self) -> str:
        """The class of its shapes in a table of configurations."""
        return "direct" if self.direct else "ieee" if self.precision == "ieee" else "units"

    def uses_matrix_units(self) -> bool:
        return self.route == "units"

    def constants(self, config: Config) -> dict:
        D = self.points.D
        block = min(config.tiles["BLOCK_D"], max(16, triton.next_power_of_2(D)))
        return {
            "COST": self.cost,
            "DEPTH": D if self.direct else 0,
            "WHOLE": D <= block,
            "PRECISION": self.precision,
            "BLOCK_D": block,
        }


@triton.jit
def coordinates(x, z, i, n, N, D, d):
    """x_i at the coordinates d, 0 where there is none."""
    inside = (i < n)[:, None] & (d < D)[None, :]
    return tl.load(x + (z * N + i)[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def differences(p, z, i, j, n, m, DEPTH: tl.constexpr):
    """‖x_i − y_j‖² coordinate by coordinate; DEPTH: how many, or 0 if that is not known."""
    u = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    x_row, y_row = p.x + (z * p.N + i) * p.D, p.y + (z * p.M + j) * p.D
    if DEPTH > 0:
        for d in tl.static_range(0, DEPTH):
            a = tl.load(x_row + d, mask=i < n, other=0.0)[:, None]
            gap = a - tl.load(y_row + d, mask=j < m, other=0.0)[None, :]
            u += gap * gap
    else:
        for d in range(0, p.D):
            a = tl.load(x_row + d, mask=i < n, other=0.0)[:, None]
            gap = a - tl.load(y_row + d, mask=j < m, other=0.0)[None, :]
            u += gap * gap
    return u


@triton.jit
def first_rows(p, z, i, n, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """What the tiles of a block of rows share: x_i at the first coordinates, and ‖x_i‖²."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    squares = tl.zeros(i.shape, tl.float32)
    if p.x_squares is not None:
        squares = tl.load(p.x_squares + z * p.N + i, mask=i < n, other=1.0)
    return coordinates(p.x, z, i, n, p.N, p.D * (DEPTH == 0), d), squares


@triton.jit
def cost_tile(
    p,
    z,
    i,
    j,
    n,
    m,
    first,
    squares,
    COST: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """c of rows i and columns j; where there are none, any number. `first`, `squares` are those of
    first_rows; WHOLE: `first` has all coordinates."""
    if DEPTH > 0:
        u = differences(p, z, i, j, n, m, DEPTH)
    else:
        d = tl.arange(0, BLOCK_D).to(tl.int64)
        y = coordinates(p.y, z, j, m, p.M, p.D, d)
        u = tl.dot(first, tl.trans(y), input_precision=PRECISION)
        if not WHOLE:
            for start in range(BLOCK_D, p.D, BLOCK_D):
                x = coordinates(p.x, z, i, n, p.N, p.D, start + d)
                y = coordinates(p.y, z, j, m, p.M, p.D, start + d)
                u = tl.dot(x, tl.trans(y), u, input_precision=PRECISION)
        if COST == DOT:
            u = p.shift - u
        else:
            # Below 1/128 of the sum seven bits are lost. A NaN comes here too: of an infinity.
            of_columns = tl.load(p.y_squares + z * p.M + j, mask=j < m, other=1.0)
            sums = squares[:, None] + of_columns[None, :]
            u = sums - 2 * u
            close = ~(u > sums / 128) & (i < n)[:, None] & (j < m)[None, :]
            if tl.max(close.to(tl.int32)) > 0:
                u = tl.where(close, differences(p, z, i, j, n, m, 0), u)
    if COST == DISTANCE:
        u = tl.where(u <= 0, 0.0, tl.sqrt_rn(tl.where(u <= 0, 1.0, u)))
    return u


@triton.jit
def squares_kernel(out, x, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """‖x_i‖² of N points."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        values = coordinates(x, 0, i, N, 0, D, d)
        total += tl.sum(values * values, 1)
    tl.store(out + i, total, mask=i < N)


@triton.jit
def matrix_kernel(
    out,
    p,
    COST: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """c of a tile, (B, N, M)."""
    tiles_m = tl.cdiv(p.M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(p.N, BLOCK_N)
    z = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, squares = first_rows(p, z, i, p.N, DEPTH, BLOCK_D)
    c = cost_tile(
        p, z, i, j, p.N, p.M, first, squares, COST, DEPTH, WHOLE, PRECISION, BLOCK_D
    )  # fmt: skip
    at = out + (z * p.N + i)[:, None] * p.M + j[None, :]
    tl.store(at, c, mask=(i < p.N)[:, None] & (j < p.M)[None, :])


def squares_of(x: Tensor) -> Tensor:
    """(B, N)"""
    out = x.new_empty(x.shape[:2])
    if out.numel():
        config = configure(TABLE, x.device, "squares")
        grid = (triton.cdiv(out.numel(), config.tiles["BLOCK_N"]),)
        launch(squares_kernel, grid, config, out, x, out.numel(), x.shape[2])
    return out


def problem_of(
    x: Tensor,
    y: Tensor,
    epsilon: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    cost: str,
    precision: str,
) -> Problem:
    same = x is y
    x, y = x.contiguous(), y.contiguous()
    N, M, D = x.shape[1], y.shape[1], x.shape[2]
    kind = COSTS[cost]
    direct = kind != DOT.value and 0 < D <= FEW
    squares = (None, None)
    if kind != DOT.value and not direct:
        of_x = squares_of(x)
        squares = of_x, of_x if same else squares_of(y)
    shift = 1.0 if cost == "cosine" else 0.0
    points = Points(x, y, *squares, whole(epsilon), whole(rows), whole(columns), N, M, D, shift)
    return Problem(points, kind, PRECISIONS[precision], direct)


def parts_of(programs: int, M: int, block: int) -> tuple[int, int]:
    """Into how many parts the columns go, and how wide they are: so many that there are programs
    enough, by shapes alone."""
    wanted = min(triton.cdiv(PROGRAMS, max(programs, 1)), triton.cdiv(M, LEAST_TILES * block))
    width = block * triton.cdiv(triton.cdiv(M, max(wanted, 1)), block)
    return max(triton.cdiv(M, max(width, 1)), 1), width


def points_cost(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """(B, N, M)"""
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[1])
    if out.numel() == 0:
        return out
    problem = problem_of(x, y, None, None, None, cost, "fp32")
    config = configure(TABLE, x.device, "matrix", problem.route)
    tiles = config.tiles
    grid = (
        x.shape[0]
        * triton.cdiv(x.shape[1], tiles["BLOCK_N"])
        * triton.cdiv(y.shape[1], tiles["BLOCK_M"]),
    )
    launch(matrix_kernel, grid, config, out, problem.points, **problem.constants(config))
    return out


def example_arguments() -> list[tuple]:
    """Arguments on meta tensors that specialise differently: products in every precision, of few
    and of many coordinates, differences, lengths."""

    def make(*shape: int, dtype=torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def clouds(B: int, N: int, M: int, D: int, lengths: bool, *words: str) -> tuple:
        sizes = [make(B, dtype=torch.int64) if lengths else None for _ in range(2)]
        return make(B, N, D), make(B, M, D), make(B), *sizes, *words

    return [
        clouds(1, 4096, 4096, 64, False, "sqeuclidean", "tf32x3"),
        clouds(1, 4096, 4096, 64, False, "sqeuclidean", "fp32"),
        clouds(8, 500, 700, 3, True, "euclidean", "fp32"),
        clouds(1, 100000, 100000, 3, False, "sqeuclidean", "fp32"),
        clouds(8, 500, 700, 300, True, "euclidean", "tf32"),
        clouds(8, 500, 700, 300, True, "euclidean", "fp32"),
        clouds(4, 300, 200, 16, False, "cosine", "fp32"),
    ]


def example_launches(dtype: torch.dtype) -> None:
    for x, y, _, _, _, cost, _ in example_arguments():
        points_cost(x, y, cost)
