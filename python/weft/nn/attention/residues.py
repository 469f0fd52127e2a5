r"""Biases by relative place within windows, as products of few columns.

The window of a query holds k consecutive places of each axis, whose indices modulo k are all
different. A bias that is read by the offset of the key is therefore a function of the query and of
the key's residue alone, :math:`\text{bias}_{ij} = \langle U_i, V_j \rangle`, with V one-hot and k²
columns in two dimensions: a table of N k² numbers takes the place of a matrix of N². Outside of
the window the product is some other entry: the mask hides it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def window_offsets(
    size: int, kernel: int, dilation: int, clamp: bool, device=None
) -> tuple[Tensor, Tensor]:
    """Of one axis: for each place and residue, by how many steps the window's place of that residue
    lies ahead, ``(size, kernel)``; and the residue of each place, ``(size,)``. Both int64.

    A window begins kernel // 2 steps before its query; with ``clamp``, it stays within the axis.
    """
    place = torch.arange(size, device=device)
    step = place // dilation
    start = step - kernel // 2
    if clamp:
        last = (size - place % dilation + dilation - 1) // dilation - kernel
        start = torch.minimum(start.clamp(min=0), last)
    residues = torch.arange(kernel, device=device)
    ahead = start[:, None] + (residues - start[:, None]) % kernel - step[:, None]
    return ahead, step % kernel


def relative_columns(
    shape: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    *,
    clamp: bool,
    device=None,
) -> tuple[Tensor, Tensor]:
    """For a bias table of ``(2 k_h - 1, 2 k_w - 1)`` offsets with ``clamp``, else ``(k_h, k_w)``.

    Returns ``(N, k_h k_w)`` int64, the entry that each column of U is read from, and ``(N,)``
    int64, the column of V that is 1.
    """
    half = [k - 1 if clamp else k // 2 for k in kernel]
    (rows, row), (columns, column) = (
        window_offsets(n, k, d, clamp, device)
        for n, k, d in zip(shape, kernel, dilation, strict=True)
    )
    rows, columns = rows + half[0], columns + half[1]
    entries = rows[:, None, :, None] * (2 * half[1] + 1) + columns[None, :, None, :]
    residue = row[:, None] * kernel[1] + column
    return entries.reshape(shape[0] * shape[1], -1), residue.flatten()


def one_hot(residue: Tensor, columns: int, like: Tensor) -> Tensor:
    """``(1, 1, N, columns)`` in the dtype of ``like``."""
    return F.one_hot(residue, columns).to(like.dtype)[None, None]
