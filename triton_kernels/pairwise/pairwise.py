"""Sums and log-sum-exps of the pair functions over columns, and their gradients, with the weights

sum        w_ij = grad_i      or      ⟨grad_i, values_j⟩
logsumexp  w_ij = grad_i e^(s_ij − out_i)
"""

import torch
from torch import Tensor

from weft.triton_kernels.pairwise.dense import Upstream, dense_of, gradients, reduced
from weft.triton_kernels.pairwise.distance import pairwise_matrix, pairwise_matrix_backward
from weft.triton_kernels.pairwise.pairs import FUNCTIONS


def pairwise_sum(*args) -> Tensor:
    """(N,) or, with values (M, E), (N, E); float32."""
    *args, values, plan = args
    N, M = args[0].shape[0], args[1].shape[0]
    E = 1 if values is None else values.shape[1]
    if N * M * E == 0:
        shape = (N,) if values is None else (N, E)
        return args[0].new_zeros(shape, dtype=torch.float32)
    if values is None:
        return reduced(dense_of(args, plan), "sum", None).squeeze(1)
    return reduced(dense_of(args, plan), "values", values.contiguous())


def pairwise_logsumexp(*args) -> Tensor:
    *args, plan = args
    N, M = args[0].shape[0], args[1].shape[0]
    if N * M == 0:
        return args[0].new_full((N,), -torch.inf, dtype=torch.float32)
    return reduced(dense_of(args, plan), "logsumexp", None).squeeze(1)


def pairwise_sum_backward(grad: Tensor, *args) -> tuple[Tensor, ...]:
    *args, values, wanted, plan = args
    grad = grad.contiguous()
    if values is None:
        return gradients(tuple(args), Upstream("sum", grad), wanted, plan)
    upstream = Upstream("values", grad, values=values.contiguous())
    return gradients(tuple(args), upstream, wanted, plan)


def pairwise_logsumexp_backward(grad: Tensor, out: Tensor, *args) -> tuple[Tensor, ...]:
    *args, wanted, plan = args
    upstream = Upstream("logsumexp", grad.contiguous(), out.contiguous())
    return gradients(tuple(args), upstream, wanted, plan)


def _examples(dtype: torch.dtype) -> list[tuple]:
    """Arguments of a pair and a mask: every plan, function and kind of mask somewhere."""
    make = lambda *shape, **kind: torch.empty(*shape, device="meta", **kind)  # noqa: E731
    factors = (make(4096), make(8192), None)
    labels = [make(n, dtype=torch.int64) for n in (4096, 8192)]
    bits = make(4096, 8192, dtype=torch.bool)
    none = (None, None, None, True, False)
    found = []
    for D in (512, 3, 1024):
        points = (make(4096, D, dtype=dtype), make(8192, D, dtype=dtype))
        plain = (*points, None, None, None)
        found.append((*plain, "dot", "identity", 1.0, 0.0, 0.0, *none))
        found.append((*plain, "sqeuclidean", "exp", 0.5, 0.0, 0.0, *none))
        pair = ("sqeuclidean", "arcosh", 2.0, 0.0, 1.0)
        found.append((*points, *factors, *pair, bits, *labels, False, True))
    for function in FUNCTIONS:
        pair = ("sqeuclidean", function, 1.0, 0.0, 1e-4)
        found.append((*found[0][:2], None, None, make(8192), *pair, *none))
    found.append((*found[0][:2], None, None, None, "l1", "identity", 1.0, 0.0, 0.0, *none))
    return found


def examples_of_forward(dtype: torch.dtype) -> None:
    for args in _examples(dtype):
        pairwise_matrix(*args[:10], "auto")
        pairwise_sum(*args, None, "auto")
        pairwise_sum(*args, torch.empty(8192, 3, device="meta"), "auto")
        pairwise_logsumexp(*args, "auto")


def examples_of_backward(dtype: torch.dtype) -> None:
    rows, columns = torch.empty(4096, device="meta"), torch.empty(8192, 3, device="meta")
    for args in _examples(dtype):
        grad = torch.empty(4096, 8192, dtype=dtype, device="meta")
        pairwise_matrix_backward(grad, *args[:10], 31, "auto")
        pairwise_sum_backward(rows, *args, None, 31, "auto")
        pairwise_sum_backward(rows[:, None].expand(4096, 3), *args, columns, 31, "auto")
        pairwise_logsumexp_backward(rows, rows, *args, 31, "auto")
