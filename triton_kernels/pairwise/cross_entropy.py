"""Cross entropies over all pairs; weft.reference.pairwise.cross_entropy has the formulas.

Forward: a block of rows goes over the columns with a running maximum and sum; for the columns of a
symmetric loss the same tiles leave one partial sum for each block of rows. Partial sums are merged
in a fixed order.
Backward: for blocks of rows × columns, tiles of s again, from them H = ∂L/∂⟨x, y⟩ in a bounded
buffer, then two products, ∂x += H y and ∂y += Hᵀ x.

Two plans. Fused: a tile's products by the matrix units. Chunked: ⟨x, y⟩ of a block by cuBLAS into a
bounded buffer, for large D and for float32, whose products have no matrix units without tf32.
"""

import torch
import triton
from torch import Tensor

from weft.triton_kernels.common import Config, configure, float32_precision, launch, product
from weft.triton_kernels.pairwise.cross_entropy_kernels import sums_kernel, weights_kernel

BUFFER_BYTES = 32 << 20  # of a block of products, in float32
MOST_ROWS = 8192
LARGEST_FUSED = 512  # dimensions
PROGRAMS = 264  # two for each multiprocessor


def _tiles(n: int, m: int, d: int) -> dict[str, int]:
    return {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d}


# (architecture, kind): sums of both sides and masks take registers of their own.
TABLE = {
    (80, "half"): Config(_tiles(64, 64, 64), num_warps=4, num_stages=3),
    (80, "half_both"): Config(_tiles(64, 64, 64), num_warps=8, num_stages=3),
    (80, "float"): Config(_tiles(32, 64, 32), num_warps=4, num_stages=3),
    (80, "float_both"): Config(_tiles(32, 64, 32), num_warps=8, num_stages=3),
    (80, "chunked"): Config(_tiles(16, 128, 16), num_warps=8),
    (90, "half"): Config(_tiles(64, 128, 64), num_warps=8, num_stages=4),
    (90, "half_both"): Config(_tiles(64, 64, 64), num_warps=8, num_stages=4),
    (90, "float"): Config(_tiles(64, 64, 32), num_warps=8, num_stages=3),
    (90, "float_both"): Config(_tiles(64, 64, 32), num_warps=8, num_stages=3),
}


def plan_of(x: Tensor) -> str:
    if x.dtype == torch.float32 and float32_precision() == "ieee":
        return "chunked"
    return "fused" if x.shape[1] <= LARGEST_FUSED else "chunked"


def _blocks(N: int, M: int) -> list[tuple[slice, slice]]:
    """Rows × columns by blocks whose products fit the buffer; columns are the inner loop."""
    rows = min(N, MOST_ROWS)
    columns = max(BUFFER_BYTES // (4 * rows), 1)
    return [
        (slice(i, min(i + rows, N)), slice(j, min(j + columns, M)))
        for i in range(0, N, rows)
        for j in range(0, M, columns)
    ]


class _Loss:
    """The arguments of both passes, and their launches on a block."""

    def __init__(self, x, y, factor, bias, target, column_labels, mask, positives, options, columns,
                 plan):  # fmt: skip
        scale, softcap, margin, uniform, sigmoid, exclude_diagonal = options
        self.x, self.y = x, y
        self.chunked = (plan or plan_of(x)) == "chunked"
        strides = lambda t: (0, 0) if t is None else t.stride()  # noqa: E731
        contiguous = lambda t: None if t is None else t.contiguous()  # noqa: E731
        self.pairs = (contiguous(factor), contiguous(bias), target.contiguous())
        self.pairs += (contiguous(column_labels), mask, *strides(mask), positives)
        self.pairs += (*strides(positives), *map(float, (scale, softcap, margin, uniform)))
        kind = "float" if x.dtype == torch.float32 else "half"
        if columns or mask is not None or positives is not None or exclude_diagonal:
            kind += "_both"
        self.config = configure(TABLE, x.device, "chunked" if self.chunked else kind)
        self.constants = {
            "SOFTCAP": softcap != 0,
            "SIGMOID": sigmoid,
            "EXCLUDE_DIAGONAL": exclude_diagonal,
            "PRECISION": float32_precision(),
        }
        self.matrix_product = not self.chunked and (
            x.dtype != torch.float32 or float32_precision() == "tf32"
        )

    def blocks(self) -> list[tuple[slice, slice]]:
        return _blocks(self.x.shape[0], self.y.shape[0])

    def problem(self, rows: slice, columns: slice) -> tuple:
        """Points, products and the block, as both kernels take them."""
        x, y = self.x, self.y
        u = None
        if self.chunked:
            u = x.new_empty(rows.stop - rows.start, columns.stop - columns.start,
                            dtype=torch.float32)  # fmt: skip
            product(x[rows], y[columns].T, out=u)
        sizes = (rows.stop, columns.stop, x.shape[1])
        return (x, y, u, rows.start, columns.start, *sizes, *x.stride(), *y.stride())

    def sums(self, rows: slice, columns: slice, row_share, column_share):
        """Partial (lse, t) of the rows, (parts, n), and of the columns, (blocks of rows, m)."""
        n, m = rows.stop - rows.start, columns.stop - columns.start
        BLOCK_N, BLOCK_M = self.config.tiles["BLOCK_N"], self.config.tiles["BLOCK_M"]
        count = triton.cdiv(n, BLOCK_N)
        parts = max(1, min(PROGRAMS // count, triton.cdiv(m, 4 * BLOCK_M)))
        width = triton.cdiv(triton.cdiv(m, parts), BLOCK_M) * BLOCK_M
        parts = triton.cdiv(m, width)
        new = lambda *shape: row_share.new_empty(shape)  # noqa: E731
        of_rows = new(parts, n), new(parts, n)
        of_columns = (None, None)
        if column_share is not None:
            of_columns = new(count, m), new(count, m)
        launch(
            sums_kernel,
            (count * parts,),
            self.config,
            *self.problem(rows, columns),
            *self.pairs,
            *(row_share, column_share, *of_rows, *of_columns, width, parts),
            matrix_product=self.matrix_product,
            **self.constants,
        )
        return of_rows, of_columns

    def weights(self, rows: slice, columns: slice, h, of_bias, of_factor, vectors) -> None:
        """H of a block, and its parts of the sums over rows and over all."""
        n, m = rows.stop - rows.start, columns.stop - columns.start
        tiles = self.config.tiles
        launch(
            weights_kernel,
            (triton.cdiv(n, tiles["BLOCK_N"]) * triton.cdiv(m, tiles["BLOCK_M"]),),
            self.config,
            *self.problem(rows, columns),
            *self.pairs,
            *(*vectors, h, of_bias, of_factor),
            matrix_product=self.matrix_product,
            **self.constants,
        )


def _merged(parts: list, sigmoid: bool) -> tuple[Tensor, Tensor]:
    lse, t = (torch.cat(side) for side in zip(*parts, strict=True))
    return lse.sum(0) if sigmoid else lse.logsumexp(0), t.sum(0)


def _weighted(weight: Tensor | None, lse: Tensor, target: Tensor) -> Tensor:
    if weight is None:
        return lse.new_zeros(())
    return torch.where(weight == 0, 0, weight * (lse - target)).sum()


def pairwise_cross_entropy(
    x: Tensor,
    y: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    column_labels: Tensor | None,
    mask: Tensor | None,
    positives: Tensor | None,
    row_share: Tensor,
    column_share: Tensor | None,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
    scale: float,
    softcap: float,
    margin: float,
    uniform: float,
    sigmoid: bool,
    exclude_diagonal: bool,
    save: bool,
    plan: str | None = None,
) -> tuple[Tensor, ...]:
    """(loss, row lse, row t, column lse, column t, four gradients if save), float32."""
    N, M = x.shape[0], y.shape[0]
    options = (scale, softcap, margin, uniform, sigmoid, exclude_diagonal)
    inputs = (x, y, factor, bias, target, column_labels, mask, positives)
    row_share = row_share.contiguous()
    column_share = None if column_share is None else column_share.contiguous()
    new = lambda n: row_share.new_empty(n)  # noqa: E731
    columns_wanted = column_share is not None
    row_sums, column_sums = [new(N), new(N)], [new(M * columns_wanted), new(M * columns_wanted)]
    if N * M == 0:
        for lse, t in (row_sums, column_sums):
            lse.fill_(0 if sigmoid else -torch.inf)
            t.zero_()
    else:
        loss = _Loss(*inputs, options, columns_wanted, plan)
        of_rows, of_columns = {}, {}
        for rows, columns in loss.blocks():
            of_row, of_column = loss.sums(rows, columns, row_share, column_share)
            of_rows.setdefault(rows.start, (rows, []))[1].append(of_row)
            if columns_wanted:
                parts = of_columns.setdefault(columns.start, (columns, []))[1]
                parts.append(tuple(t[None] for t in _merged([of_column], sigmoid)))
        for merged, sums in ((of_rows, row_sums), (of_columns, column_sums)):
            for where, parts in merged.values():
                for to, total in zip(sums, _merged(parts, sigmoid), strict=True):
                    to[where] = total
    loss = _weighted(row_weight, *row_sums)
    if columns_wanted:
        loss = loss + _weighted(column_weight, *column_sums)
    results = (loss, *row_sums, *column_sums)
    if not save:
        return *results, *(new(0) for _ in range(4))
    shares = (row_share, column_share, row_weight, column_weight)
    one = loss.new_ones(())
    lse = (row_sums[0], column_sums[0])
    grads = _gradients(*inputs, *shares, options, *lse, (one, *[None] * 4), torch.float32, plan)
    return *results, *grads


def pairwise_cross_entropy_backward(
    x: Tensor,
    y: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    column_labels: Tensor | None,
    mask: Tensor | None,
    positives: Tensor | None,
    row_share: Tensor,
    column_share: Tensor | None,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
    scale: float,
    softcap: float,
    margin: float,
    uniform: float,
    sigmoid: bool,
    exclude_diagonal: bool,
    row_lse: Tensor,
    column_lse: Tensor,
    saved_x: Tensor,
    saved_y: Tensor,
    saved_factor: Tensor,
    saved_bias: Tensor,
    *upstream: Tensor | None,
    plan: str | None = None,
) -> tuple[Tensor, ...]:
    """(∂x, ∂y in the dtype of x, ∂factor, ∂bias in float32, empty where there is none)."""
    if saved_x.numel() or saved_y.numel():
        grad = upstream[0]
        narrow = [(grad * t).to(x.dtype) for t in (saved_x, saved_y)]
        return *narrow, grad * saved_factor, grad * saved_bias
    options = (scale, softcap, margin, uniform, sigmoid, exclude_diagonal)
    inputs = (x, y, factor, bias, target, column_labels, mask, positives)
    shares = (row_share, column_share, row_weight, column_weight)
    return _gradients(*inputs, *shares, options, row_lse, column_lse, upstream, x.dtype, plan)


def _gradients(
    x, y, factor, bias, target, column_labels, mask, positives, row_share, column_share, row_weight,
    column_weight, options, row_lse, column_lse, upstream, dtype, plan,
):  # fmt: skip
    (N, D), M = x.shape, y.shape[0]
    wide = {"dtype": torch.float32, "device": x.device}
    if N * M == 0:
        of_factor = torch.zeros(() if factor is not None else (0,), **wide)
        of_bias = torch.zeros(M if bias is not None else 0, **wide)
        return x.new_zeros(N, D, dtype=dtype), y.new_zeros(M, D, dtype=dtype), of_factor, of_bias
    grad_loss, *of_sums = upstream
    if grad_loss is not None:
        weights = (row_weight, column_weight if column_share is not None else None)
        of_lse = [None if w is None else grad_loss * w for w in weights]
        of_sums = [of_lse[0], -of_lse[0], of_lse[1], None if of_lse[1] is None else -of_lse[1]]
    of_row, of_t, of_column, of_column_t = of_sums
    sides = [(row_lse, of_row, of_t, row_share)]
    if column_share is not None:
        sides.append((column_lse, of_column, of_column_t, column_share))
    # float16 would lose small gradients: H is scaled to its range by a power of two.
    power = torch.ones((), **wide)
    if x.dtype == torch.float16:
        largest = sum(a.abs().amax() + b.abs().amax() for _, a, b, _ in sides)
        largest = largest * abs(options[0]) * (1 if factor is None else factor.abs())
        exponent = 14 - torch.frexp(largest).exponent.clamp(-80, 80)
        power = torch.where(largest > 0, torch.ldexp(power, exponent), power)
    vectors = []
    for lse, a, b, share in sides:
        vectors += [lse.contiguous(), a * power, b * power * share, b * power * options[3]]
    vectors += [None] * (8 - len(vectors))

    loss = _Loss(x, y, factor, bias, target, column_labels, mask, positives, options,
                 column_share is not None, plan)  # fmt: skip
    sums_x, sums_y = torch.zeros(N, D, **wide), torch.zeros(M, D, **wide)
    BLOCK_N, BLOCK_M = loss.config.tiles["BLOCK_N"], loss.config.tiles["BLOCK_M"]
    of_factor, of_bias = [], None if bias is None else torch.zeros(M, **wide)
    usual = lambda t: torch.where(t.isfinite(), t, 0)  # noqa: E731  0 · NaN is NaN
    for rows, columns in loss.blocks():
        n, m = rows.stop - rows.start, columns.stop - columns.start
        count = triton.cdiv(n, BLOCK_N)
        h = x.new_empty(n, m)
        bias_parts = None if bias is None else torch.empty(count, m, **wide)
        factor_parts = None
        if factor is not None:
            factor_parts = torch.empty(count * triton.cdiv(m, BLOCK_M), **wide)
        loss.weights(rows, columns, h, bias_parts, factor_parts, vectors)
        sums_x[rows] += product(h, usual(y[columns]), out=torch.empty(n, D, **wide))
        sums_y[columns] += product(h.T, usual(x[rows]), out=torch.empty(m, D, **wide))
        if of_bias is not None:
            of_bias[columns] += bias_parts.sum(0)
        if factor_parts is not None:
            of_factor.append(factor_parts.sum())
    back = 1 / power
    of_factor = torch.stack(of_factor).sum() * back if of_factor else torch.empty(0, **wide)
    of_bias = torch.empty(0, **wide) if of_bias is None else of_bias * back
    return (sums_x.mul_(back).to(dtype), sums_y.mul_(back).to(dtype), of_factor, of_bias)
