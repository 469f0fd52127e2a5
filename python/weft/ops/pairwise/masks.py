"""Masks of pairs: which (i, j) count, without a stored matrix where labels or positions say it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from weft.reference.pairwise.masks import allowed_pairs

SCHEMA = "Tensor? mask, Tensor? row_labels, Tensor? column_labels, bool same, bool exclude_diagonal"


@dataclass(frozen=True)
class PairMask:
    """The pairs of rows (x_i, y_j) that count: those that all of its conditions allow.

    ``PairMask.same_labels(a, b) & PairMask.off_diagonal()`` are the positives of a batch with
    itself. A bool tensor ``(N, M)`` is a mask too, and goes with the others by ``&``.
    """

    dense: Tensor | None = None
    row_labels: Tensor | None = None
    column_labels: Tensor | None = None
    same: bool = True
    exclude_diagonal: bool = False

    @classmethod
    def same_labels(cls, rows: Tensor, columns: Tensor) -> "PairMask":
        """Pairs whose labels, ``(N,)`` and ``(M,)`` int64, are equal."""
        return cls(row_labels=rows, column_labels=columns, same=True)

    @classmethod
    def different_labels(cls, rows: Tensor, columns: Tensor) -> "PairMask":
        """Pairs whose labels differ."""
        return cls(row_labels=rows, column_labels=columns, same=False)

    @classmethod
    def off_diagonal(cls) -> "PairMask":
        """All pairs but (i, i)."""
        return cls(exclude_diagonal=True)

    def __and__(self, other: "PairMask | Tensor") -> "PairMask":
        other = PairMask(other) if isinstance(other, Tensor) else other
        if self.row_labels is not None and other.row_labels is not None:
            raise ValueError("mask: two conditions on labels; give the second as a bool tensor")
        labelled = self if self.row_labels is not None else other
        dense = [m.dense for m in (self, other) if m.dense is not None]
        return PairMask(
            dense[0] & dense[1] if len(dense) == 2 else (dense[0] if dense else None),
            labelled.row_labels,
            labelled.column_labels,
            labelled.same,
            self.exclude_diagonal or other.exclude_diagonal,
        )

    __rand__ = __and__

    @property
    def T(self) -> "PairMask":
        """The same pairs with the roles of x and y exchanged."""
        dense = None if self.dense is None else self.dense.T
        return replace(
            self, dense=dense, row_labels=self.column_labels, column_labels=self.row_labels
        )

    def block(self, first: int, count: int, M: int, device: torch.device) -> Tensor | None:
        """Rows [first, first + count) as a bool tensor, or None where all pairs count."""
        part = slice(first, first + count)
        dense = None if self.dense is None else self.dense[part]
        labels = None if self.row_labels is None else self.row_labels[part]
        others = (self.column_labels, self.same, self.exclude_diagonal)
        return allowed_pairs(count, M, device, dense, labels, *others, first)

    def to_dense(self, N: int, M: int, device: torch.device) -> Tensor | None:
        """All pairs, (N, M) bool, or None where all count."""
        return self.block(0, N, M, device)

    def arguments(self) -> tuple:
        """In the order of ``SCHEMA``."""
        return (
            self.dense,
            self.row_labels,
            self.column_labels,
            self.same,
            self.exclude_diagonal,
        )


register_pytree_node(
    PairMask,
    lambda m: ([m.dense, m.row_labels, m.column_labels], (m.same, m.exclude_diagonal)),
    lambda tensors, flags: PairMask(*tensors, *flags),
    serialized_type_name="weft.PairMask",
)


def pair_mask(mask: "PairMask | Tensor | None", x: Tensor, y: Tensor) -> PairMask:
    """What ``mask=`` of a public function means for rows x and y, checked."""
    if mask is None:
        return PairMask()
    if isinstance(mask, Tensor):
        mask = PairMask(mask)
    if not isinstance(mask, PairMask):
        raise TypeError(f"mask must be a bool tensor or a PairMask, got {type(mask).__name__}")
    N, M = x.shape[0], y.shape[0]
    _check(mask.dense, torch.bool, (N, M), x.device, "a bool tensor")
    if (mask.row_labels is None) != (mask.column_labels is None):
        raise ValueError("mask: labels must be given for rows and columns, or for neither")
    for labels, size in ((mask.row_labels, N), (mask.column_labels, M)):
        _check(labels, torch.int64, (size,), x.device, "of int64 labels")
    return mask


def _check(part, dtype: torch.dtype, shape: tuple, device: torch.device, what: str) -> None:
    if part is None:
        return
    if not isinstance(part, Tensor) or part.dtype != dtype:
        raise TypeError(f"mask must be {what}, got {getattr(part, 'dtype', type(part).__name__)}")
    if part.shape != shape or part.device != device:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(
            f"mask must be ({expected}) on {device}, got {tuple(part.shape)} on {part.device}"
        )
