"""The matrix of all pairs, s_ij (weft.reference.pairwise.pairs), and its gradient: the weights of
the shared backward (weft.reference.pairwise.gradients) are the upstream gradient itself.
"""

from torch import Tensor

from weft.reference.pairwise.gradients import pair_gradients
from weft.reference.pairwise.pairs import Pair, pair_values


def pairwise_matrix(
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    pair: Pair,
) -> Tensor:
    """(N, M) in the dtype of x."""
    return pair_values(x, y, pair, row_factor, column_factor, bias).to(x.dtype)


def pairwise_matrix_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    bias: Tensor | None,
    pair: Pair,
) -> tuple[Tensor | None, ...]:
    wide = grad.double() if x.dtype.itemsize == 8 else grad.float()
    return pair_gradients(wide, x, y, row_factor, column_factor, bias, pair)
