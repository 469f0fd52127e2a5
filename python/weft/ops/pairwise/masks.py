"""Masks of pairs: which columns a row may see, without an (N, M) matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from weft.reference.pairwise.masks import allowed_pairs

SCHEMA = "Tensor? mask, Tensor? x_labels, Tensor? y_labels, bool same, bool off_diagonal"


@dataclass(frozen=True)
class PairMask:
    """The pairs (i, j) that count: those that every part given allows.

    Attributes:
        allowed: ``(N, M)`` bool, any strides, True where the pair counts.
        x_labels, y_labels: ``(N,)`` and ``(M,)`` int64: the pairs of equal labels (``equal``) or of
            different ones.
        off_diagonal: without the pairs i = j, the ones of a row with itself.

    ``PairMask.same(a, b) & PairMask.distinct()`` joins parts; a mask has one pair of label vectors.
    """

    allowed: Tensor | None = None
    x_labels: Tensor | None = None
    y_labels: Tensor | None = None
    equal: bool = True
    off_diagonal: bool = False

    @classmethod
    def same(cls, x_labels: Tensor, y_labels: Tensor) -> "PairMask":
        """Pairs of equal labels."""
        return cls(x_labels=x_labels, y_labels=y_labels)

    @classmethod
    def different(cls, x_labels: Tensor, y_labels: Tensor) -> "PairMask":
        """Pairs of different labels."""
        return cls(x_labels=x_labels, y_labels=y_labels, equal=False)

    @classmethod
    def distinct(cls) -> "PairMask":
        """Pairs i ≠ j: of the rows of one matrix, without each row's pair with itself."""
        return cls(off_diagonal=True)

    def __and__(self, other: "PairMask") -> "PairMask":
        if self.x_labels is not None and other.x_labels is not None:
            raise ValueError("mask: both parts have labels; join them into one pair of vectors")
        labelled = self if self.x_labels is not None else other
        if self.allowed is None or other.allowed is None:
            allowed = other.allowed if self.allowed is None else self.allowed
        else:
            allowed = self.allowed & other.allowed
        return PairMask(
            allowed,
            labelled.x_labels,
            labelled.y_labels,
            labelled.equal,
            self.off_diagonal or other.off_diagonal,
        )

    @property
    def mT(self) -> "PairMask":
        """The mask of the pairs (j, i)."""
        allowed = None if self.allowed is None else self.allowed.mT
        return PairMask(allowed, self.y_labels, self.x_labels, self.equal, self.off_diagonal)

    def block(self, first: int, count: int, M: int, device: torch.device) -> Tensor | None:
        """Rows [first, first + count) as a bool tensor, ``(count, M)``; None where all count."""
        rows = slice(first, first + count)
        allowed = None if self.allowed is None else self.allowed[rows]
        x_labels = None if self.x_labels is None else self.x_labels[rows]
        others = (self.y_labels, self.equal, self.off_diagonal)
        return allowed_pairs(count, M, device, allowed, x_labels, *others, first)

    def arguments(self) -> tuple:
        """In the order of ``SCHEMA``."""
        labels = (None if t is None else t.contiguous() for t in (self.x_labels, self.y_labels))
        return self.allowed, *labels, self.equal, self.off_diagonal


register_pytree_node(
    PairMask,
    lambda m: ([m.allowed, m.x_labels, m.y_labels], (m.equal, m.off_diagonal)),
    lambda tensors, flags: PairMask(*tensors, *flags),
    serialized_type_name="weft.PairMask",
)


def mask_of(mask: Tensor | PairMask | None, x: Tensor, y: Tensor) -> PairMask:
    """``mask`` as a ``PairMask`` of the rows of x and y, checked."""
    if mask is None:
        return PairMask()
    if isinstance(mask, Tensor):
        mask = PairMask(mask)
    if not isinstance(mask, PairMask):
        raise TypeError(f"mask must be a bool tensor or a weft.PairMask, got {type(mask).__name__}")
    N, M = x.shape[0], y.shape[0]
    if mask.allowed is not None:
        _check("mask", mask.allowed, (N, M), torch.bool, x.device)
    if (mask.x_labels is None) != (mask.y_labels is None):
        raise ValueError("mask must have both x_labels and y_labels, or neither")
    if mask.x_labels is not None:
        _check("mask.x_labels", mask.x_labels, (N,), torch.int64, x.device)
        _check("mask.y_labels", mask.y_labels, (M,), torch.int64, x.device)
    return mask


def _check(name: str, tensor: Tensor, shape: tuple, dtype: torch.dtype, device) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        kind = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be a {kind} tensor, got {getattr(tensor, 'dtype', tensor)}")
    if tensor.shape != shape or tensor.device != device:
        raise ValueError(
            f"{name} must be {tuple(shape)} on {device}, got {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
