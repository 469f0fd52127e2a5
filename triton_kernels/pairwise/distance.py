"""The matrix of all s_ij, tile by tile, and its gradient: weights that are the upstream itself."""

import triton
from torch import Tensor

from weft.triton_kernels.pairwise.dense import Upstream, dense_of, gradients
from weft.triton_kernels.pairwise.dense_forward import matrix_kernel


def pairwise_matrix(*args) -> Tensor:
    """(N, M) in the dtype of x."""
    *args, plan = args
    x, y = args[:2]
    N, M = x.shape[0], y.shape[0]
    out = x.new_empty(N, M)
    if N * M == 0:
        return out
    dense = dense_of(args, plan)
    tiles = dense.config().tiles
    for rows, columns in dense.blocks():
        n, m = rows.stop - rows.start, columns.stop - columns.start
        grid = triton.cdiv(n, tiles["BLOCK_N"]) * triton.cdiv(m, tiles["BLOCK_M"])
        dense.launch(matrix_kernel, grid, rows, columns, out, M)
    return out


def pairwise_matrix_backward(grad: Tensor, *args) -> tuple[Tensor, ...]:
    *args, wanted, plan = args
    return gradients(tuple(args), Upstream("matrix", grad), wanted, plan)
