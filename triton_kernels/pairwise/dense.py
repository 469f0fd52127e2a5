"""The dense reductions of the pair functions, forward and backward, by one of three plans:

direct   tiles of differences in registers: few dimensions, and ‖·‖₁. The backward goes over the
         rows for ∂x and, with the problem swapped, over the columns for ∂y
fused    products of a tile by the matrix units, reduced on chip
chunked  products of a block of rows × columns by cuBLAS into a bounded buffer, for large D and for
         float32, whose products have no matrix units without tf32

The backward of fused and chunked computes tiles again, writes H = ∂L/∂u of a block into a bounded
buffer, and ∂x += H y and ∂y += Hᵀ x by cuBLAS. Nothing of size N·M is stored.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from weft.triton_kernels.common import Config, configure, float32_precision, launch, product
from weft.triton_kernels.pairwise.dense_backward import direct_gradient_kernel, weights_kernel
from weft.triton_kernels.pairwise.dense_forward import reduce_kernel
from weft.triton_kernels.pairwise.dense_tiles import KINDS
from weft.triton_kernels.pairwise.pairs import DIRECT_UP_TO, Problem, problem_of

BUFFER_BYTES = 32 << 20  # of a block of products, in float32
MOST_ROWS = 8192
LARGEST_FUSED = 512  # dimensions
PROGRAMS = 264  # two for each multiprocessor
MOST_VALUES = 16  # columns of values that a program sums


def _tiles(n: int, m: int, d: int) -> dict[str, int]:
    return {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d}


TABLE = {
    (80, "direct"): Config(_tiles(64, 64, 16), num_warps=8),
    (80, "chunked"): Config(_tiles(32, 64, 16), num_warps=4),
    (80, "half"): Config(_tiles(64, 64, 64), num_warps=4, num_stages=3),
    (80, "half_masked"): Config(_tiles(64, 64, 64), num_warps=8, num_stages=3),
    (80, "float"): Config(_tiles(32, 64, 32), num_warps=4, num_stages=3),
    (80, "float_masked"): Config(_tiles(32, 64, 32), num_warps=8, num_stages=3),
    (90, "half"): Config(_tiles(64, 128, 64), num_warps=8, num_stages=4),
    (90, "half_masked"): Config(_tiles(64, 64, 64), num_warps=8, num_stages=4),
    (90, "float"): Config(_tiles(64, 64, 32), num_warps=8, num_stages=3),
    (90, "float_masked"): Config(_tiles(64, 64, 32), num_warps=8, num_stages=3),
}
GRADIENT = {(80,): Config({**_tiles(64, 64, 16), "BLOCK_E": 16}, num_warps=8)}


def plan_of(x: Tensor, base: str, plan: str) -> str:
    if base == "l1" or (plan == "auto" and x.shape[1] <= DIRECT_UP_TO):
        return "direct"
    if plan != "auto":
        return plan
    if x.dtype == torch.float32 and float32_precision() == "ieee":
        return "chunked"
    return "fused" if x.shape[1] <= LARGEST_FUSED else "chunked"


@dataclass(frozen=True)
class Dense:
    """A problem with its mask and plan, and launches on blocks of it."""

    problem: Problem
    plan: str
    mask: Tensor | None = None
    row_labels: Tensor | None = None
    column_labels: Tensor | None = None
    same: bool = True
    off_diagonal: bool = False

    def swapped(self) -> "Dense":
        return replace(
            self,
            problem=self.problem.swapped(),
            mask=None if self.mask is None else self.mask.mT,
            row_labels=self.column_labels,
            column_labels=self.row_labels,
        )

    def config(self) -> Config:
        masked = self.off_diagonal or self.mask is not None or self.row_labels is not None
        kind = self.problem.dtype_class + "_masked" * masked
        kind = self.plan if self.plan != "fused" else kind
        return configure(TABLE, self.problem.x.device, kind)

    def blocks(self) -> list[tuple[slice, slice]]:
        """All pairs where nothing is buffered, else blocks whose products fit the buffer."""
        N, M, _ = self.problem.shape
        if self.plan != "chunked":
            return [(slice(0, N), slice(0, M))]
        return buffered_blocks(N, M)

    def arguments(self, rows: slice, columns: slice) -> tuple:
        x, y, _, _, *rest = self.problem.arguments()
        products = None
        if self.plan == "chunked":
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            products = x.new_empty(shape, dtype=torch.float32)
            product(x[rows], y[columns].T, out=products)
        strides = (0, 0) if self.mask is None else self.mask.stride()
        block = (products, rows.start, columns.start)
        mask = (self.mask, *strides, self.row_labels, self.column_labels)
        return (x, y, rows.stop, columns.stop, *rest, *block, *mask)

    def launch(self, kernel, grid: int, rows, columns, *args, config=None, **constants) -> None:
        units = self.plan == "fused" and self.problem.uses_matrix_units()
        launch(
            kernel,
            (grid,),
            config or self.config(),
            *self.arguments(rows, columns),
            *args,
            matrix_product=units,
            SAME=self.same,
            OFF_DIAGONAL=self.off_diagonal,
            **self.problem.constants(),
            **constants,
        )


def buffered_blocks(N: int, M: int) -> list[tuple[slice, slice]]:
    rows = max(min(N, MOST_ROWS), 1)
    columns = max(BUFFER_BYTES // (4 * rows), 1)
    return [
        (slice(i, min(i + rows, N)), slice(j, min(j + columns, M)))
        for i in range(0, N, rows)
        for j in range(0, M, columns)
    ]


def dense_of(args: tuple, plan: str) -> Dense:
    """From the arguments of a pair's schema and, if there are 15, a mask's."""
    x, base = args[0], args[5]
    plan = plan_of(x, base, plan)
    problem = problem_of(*args[:10], direct=plan == "direct")
    if problem.direct:
        plan = "direct"
    return Dense(problem, plan, *args[10:])


def parts_of(count: int, m: int, block: int) -> tuple[int, int]:
    """(width, parts) of the columns, so that few blocks of rows use the whole card too."""
    parts = max(1, min(PROGRAMS // max(count, 1), triton.cdiv(m, 4 * block)))
    width = triton.cdiv(triton.cdiv(m, parts), block) * block
    return width, triton.cdiv(m, width)


def reduced(dense: Dense, kind: str, values: Tensor | None) -> Tensor:
    """(N, E) in float32, of neither empty rows nor columns."""
    N, M, _ = dense.problem.shape
    E = 1 if values is None else values.shape[1]
    tiles = dense.config().tiles
    BLOCK_E = min(triton.next_power_of_2(E), MOST_VALUES)
    found: dict[int, tuple[slice, list[Tensor]]] = {}
    for rows, columns in dense.blocks():
        n, m = rows.stop - rows.start, columns.stop - columns.start
        count, tiles_e = triton.cdiv(n, tiles["BLOCK_N"]), triton.cdiv(E, BLOCK_E)
        width, parts = parts_of(count * tiles_e, m, tiles["BLOCK_M"])
        part = torch.empty(parts, n, E, dtype=torch.float32, device=dense.problem.x.device)
        args = (values, E, part, width, parts)
        grid = count * parts * tiles_e
        kinds = {"KIND": KINDS[kind], "BLOCK_E": BLOCK_E}
        dense.launch(reduce_kernel, grid, rows, columns, *args, **kinds)
        found.setdefault(rows.start, (rows, []))[1].append(part)
    out = torch.empty(N, E, dtype=torch.float32, device=dense.problem.x.device)
    for rows, parts in found.values():
        merged = torch.cat(parts)
        out[rows] = merged.logsumexp(0) if kind == "logsumexp" else merged.sum(0)
    return out


@dataclass(frozen=True)
class Upstream:
    """What a kind of reduction needs for ∂L/∂s_ij."""

    kind: str
    grad: Tensor
    saved: Tensor | None = None
    values: Tensor | None = None
    of_columns: bool = False

    def arguments(self) -> tuple:
        strides = self.grad.stride() if self.kind == "matrix" else (0, 0)
        E = 0 if self.values is None else self.values.shape[1]
        return (self.grad, *strides, self.saved, self.values, E)

    def constants(self) -> dict:
        return {"KIND": KINDS[self.kind], "SWAPPED": self.of_columns}

    def swapped(self) -> "Upstream":
        if self.kind == "matrix":
            return replace(self, grad=self.grad.mT)
        if self.kind == "values":
            return replace(self, grad=self.values, values=self.grad)
        return replace(self, of_columns=not self.of_columns)


def gradients(args: tuple, upstream: Upstream, wanted: int, plan: str) -> tuple[Tensor, ...]:
    """Of x, y, the factors and the bias; of what is not wanted or not there, an empty tensor."""
    tensors = args[:5]
    want = [t is not None and bool(wanted >> p & 1) for p, t in enumerate(tensors)]
    N, M = tensors[0].shape[0], tensors[1].shape[0]
    if N * M == 0:
        results = [t.new_zeros(t.shape) if w else None for t, w in zip(tensors, want, strict=True)]
    else:
        dense = dense_of(args, plan)
        run = _direct_gradients if dense.plan == "direct" else _product_gradients
        results = run(dense, upstream, want)
    new = lambda: tensors[0].new_empty(0)  # noqa: E731
    return tuple(
        result.to(t.dtype) if w else new()
        for result, t, w in zip(results, tensors, want, strict=True)
    )


def _direct_gradients(dense: Dense, upstream: Upstream, want: list[bool]) -> list[Tensor | None]:
    x, y, alpha, beta, bias = want
    results: list[Tensor | None] = [None] * 5
    if x or alpha:
        results[0], results[2], _ = _of_rows(dense, upstream, x, alpha, False)
    if y or beta or bias:
        swapped = _of_rows(dense.swapped(), upstream.swapped(), y, beta, bias)
        results[1], results[3], results[4] = swapped
    return results


def _of_rows(dense: Dense, upstream: Upstream, x: bool, alpha: bool, bias: bool) -> tuple:
    N, M, D = dense.problem.shape
    config = configure(GRADIENT, dense.problem.x.device)
    tiles = dict(config.tiles)
    tiles["BLOCK_E"] = min(triton.next_power_of_2(max(D, 1)), tiles["BLOCK_E"])
    config = Config(tiles, config.num_warps, config.num_stages)
    tiles_d = max(triton.cdiv(D, tiles["BLOCK_E"]), 1)
    count = triton.cdiv(N, tiles["BLOCK_N"])
    width, parts = parts_of(count * tiles_d, M, tiles["BLOCK_M"])
    new = lambda *s: torch.empty(s, dtype=torch.float32, device=dense.problem.x.device)  # noqa: E731
    out = new(parts, N, D) if x else None
    of_row, of_bias = new(parts, N) if alpha else None, new(parts, N) if bias else None
    dense.launch(
        direct_gradient_kernel,
        count * parts * tiles_d,
        *(slice(0, N), slice(0, M)),
        *(*upstream.arguments(), out, of_row, of_bias, width, parts, tiles_d),
        config=config,
        **upstream.constants(),
    )
    return tuple(None if t is None else t.sum(0) for t in (out, of_row, of_bias))


def _product_gradients(dense: Dense, upstream: Upstream, want: list[bool]) -> list[Tensor | None]:
    problem = dense.problem
    N, M, D = problem.shape
    tiles = dense.config().tiles
    wide = {"dtype": torch.float32, "device": problem.x.device}
    sizes = ((N, D), (M, D), (N,), (M,), (M,))
    results = [torch.zeros(s, **wide) if w else None for s, w in zip(sizes, want, strict=True)]
    usual = lambda t: torch.where(t.isfinite(), t, 0)  # noqa: E731  0 · NaN is NaN
    for rows, columns in buffered_blocks(N, M):
        n, m = rows.stop - rows.start, columns.stop - columns.start
        tiles_n, tiles_m = triton.cdiv(n, tiles["BLOCK_N"]), triton.cdiv(m, tiles["BLOCK_M"])
        half = problem.x.dtype == torch.float16
        h = torch.empty(
            n, m, dtype=torch.float32 if half else problem.x.dtype, device=wide["device"]
        )
        parts = [
            torch.empty(count, size, **wide) if w else None
            for count, size, w in zip((tiles_m, tiles_n, tiles_n), (n, m, m), want[2:], strict=True)
        ]
        grid = tiles_n * tiles_m
        args = (*upstream.arguments(), h, *parts)
        dense.launch(weights_kernel, grid, rows, columns, *args, **upstream.constants())
        back = None
        if half:  # float16 would lose small gradients: scaled to its range by a power of two
            exponent = 14 - torch.frexp(h.abs().amax()).exponent.clamp(-80, 80)
            h = torch.ldexp(h, exponent).to(torch.float16)
            back = -exponent
        if want[0]:
            results[0][rows] += _products(problem, h, usual(problem.y[columns]),
                                          usual(problem.x[rows]), back)  # fmt: skip
        if want[1]:
            results[1][columns] += _products(problem, h.T, usual(problem.x[rows]),
                                             usual(problem.y[columns]), back)  # fmt: skip
        for result, part, where in zip(results[2:], parts, (rows, columns, columns), strict=True):
            if part is not None:
                result[where] += part.sum(0)
    return results


def _products(problem: Problem, h: Tensor, other: Tensor, own: Tensor, back) -> Tensor:
    """H y, or of squares 2 (x Σ_j h − H y), with the sums of what the product sees."""
    shape = (h.shape[0], other.shape[1])
    sums = product(h, other, out=torch.empty(shape, dtype=torch.float32, device=h.device))
    if problem.base == "sqeuclidean":
        sums = 2 * (own * h.sum(1, keepdim=True, dtype=torch.float32) - sums)
    return sums if back is None else torch.ldexp(sums, back)
