"""Gradients of chosen pairs (i, j_ir):  ∂v = g f'(v),   ∂u = ∂v scale α_i β_j,

    ∂x_i = Σ_r ∂u ∂u/∂x_i,   ∂y_j = Σ_{(i, r): j_ir = j} ∂u ∂u/∂y_j,   likewise ∂α, ∂β and ∂bias.

One kernel computes ∂u and ∂v of every pair; the sums go over pairs sorted by their row of y.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch
from weft.triton_kernels.pairwise.pairs import BASES, DOT, FUNCTIONS, SQUARED, slope
from weft.triton_kernels.pairwise.segments import segment_gradient, segment_sum

WEIGHTS = {(80,): Config({"BLOCK_E": 32, "BLOCK_D": 64}, num_warps=4)}


@triton.jit
def weights_kernel(
    grad,
    x,
    y,
    indices,
    D,
    stride_xn,
    stride_xd,
    stride_ym,
    stride_yd,
    E,
    k,
    scale,
    shift,
    row_factor,
    column_factor,
    bias,
    parameter,
    of_base,
    of_argument,
    of_row,
    of_column,
    BASE: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """∂u, ∂v and the parts of ∂α and ∂β of the chosen pairs e = i k + r, 0 where there is none."""
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    i = e // k
    j = tl.load(indices + e, mask=e < E, other=-1)
    exist = j >= 0
    u = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = exist[:, None] & (d < D)[None, :]
        at_x = x + i[:, None] * stride_xn + d[None, :] * stride_xd
        at_y = y + j[:, None] * stride_ym + d[None, :] * stride_yd
        a = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at_y, mask=inside, other=0.0).to(tl.float32)
        if BASE == DOT:
            u += tl.sum(a * b, 1)
        elif BASE == SQUARED:
            u += tl.sum((a - b) * (a - b), 1)
        else:
            u += tl.sum(tl.abs(a - b), 1)
    alpha = tl.full((BLOCK_E,), 1.0, tl.float32)
    beta = tl.full((BLOCK_E,), 1.0, tl.float32)
    if row_factor is not None:
        alpha = tl.load(row_factor + i, mask=exist, other=0.0)
    if column_factor is not None:
        beta = tl.load(column_factor + j, mask=exist, other=0.0)
    v = scale * alpha * beta * u + shift
    if bias is not None:
        v += tl.load(bias + j, mask=exist, other=0.0)
    g = tl.load(grad + e, mask=exist, other=0.0).to(tl.float32)
    g = tl.where(exist, g * slope(v, parameter, FUNCTION), 0.0)
    tl.store(of_base + e, g * (scale * alpha * beta), mask=e < E)
    if bias is not None:
        tl.store(of_argument + e, g, mask=e < E)
    if row_factor is not None:
        tl.store(of_row + e, g * (scale * beta * u), mask=e < E)
    if column_factor is not None:
        tl.store(of_column + e, g * (scale * alpha * u), mask=e < E)


def pairwise_select_backward(
    grad: Tensor,
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
    indices: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, y, the factors and the bias; of what is not there, an empty tensor."""
    (N, D), M, k = x.shape, y.shape[0], indices.shape[1]
    tensors = (x, y, row_factor, column_factor, bias)
    if N * M == 0:
        return tuple(x.new_empty(0) if t is None else t.new_zeros(t.shape) for t in tensors)
    indices = indices.contiguous()
    E = N * k
    wide = {"dtype": torch.float32, "device": x.device}
    parts = [torch.empty(E if t is not None else 0, **wide) for t in (x, bias, *tensors[2:4])]
    of_base, of_argument, of_row, of_column = parts
    contiguous = lambda t: None if t is None else t.contiguous()  # noqa: E731
    config = configure(WEIGHTS, x.device)
    launch(
        weights_kernel,
        (triton.cdiv(E, config.tiles["BLOCK_E"]),),
        config,
        *(grad.contiguous(), x, y, indices, D, *x.stride(), *y.stride(), E, k),
        *(float(scale), float(shift), contiguous(row_factor), contiguous(column_factor)),
        *(contiguous(bias), float(parameter), *parts),
        BASE=BASES[base],
        FUNCTION=FUNCTIONS[function],
    )
    row_ends = torch.arange(0, E + 1, k, device=x.device)
    grad_x = segment_gradient(x, y, row_ends, indices.flatten(), of_base, base)
    columns, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(columns, torch.arange(M + 1, device=x.device))
    grad_y = segment_gradient(y, x, ends, order // k, of_base[order], base)
    return (
        grad_x,
        grad_y,
        x.new_empty(0) if row_factor is None else segment_sum(of_row, row_ends),
        x.new_empty(0) if column_factor is None else segment_sum(of_column[order], ends),
        x.new_empty(0) if bias is None else segment_sum(of_argument[order], ends),
    )


def example_launches(dtype: torch.dtype) -> None:
    x = torch.empty(10_000, 128, dtype=dtype, device="meta")
    y = torch.empty(8192, 128, dtype=dtype, device="meta")
    grad, indices = x.new_empty(10_000, 10), x.new_empty(10_000, 10, dtype=torch.int64)
    for base in BASES:
        pair = (base, "identity", 1.0, 0.0, 0.0)
        pairwise_select_backward(grad, x, y, None, None, None, *pair, indices)
    factors = [torch.empty(n, device="meta") for n in (10_000, 8192, 8192)]
    for function in FUNCTIONS:
        pair = ("sqeuclidean", function, 2.0, 0.0, 1.0)
        pairwise_select_backward(grad, x, y, *factors, *pair, indices)
