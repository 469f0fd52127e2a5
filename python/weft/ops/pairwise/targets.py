"""Which pairs of a contrastive loss are positives, and the share that each has of its row."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.ops.checks import values_are_checked
from weft.ops.pairwise.pairs import check_rows


@dataclass(frozen=True)
class Targets:
    """The operands of ``weft::pairwise_cross_entropy`` that say so."""

    target: Tensor  # (N,) int64: a column, or the label that column_labels must equal
    row_share: Tensor  # (N,): 1 / number of positives, 0 where there are none
    column_share: Tensor | None = None
    column_labels: Tensor | None = None
    positives: Tensor | None = None
    exclude_diagonal: bool = False

    def shares(self) -> list[Tensor]:
        """Of the rows and, where both sides have a loss, of the columns."""
        return [s for s in (self.row_share, self.column_share) if s is not None]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_index(name: str, value: Tensor, size: int, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(
            f"{name} must be an int64 tensor, got {getattr(value, 'dtype', type(value))}"
        )
    if value.shape != (size,) or value.device != device:
        raise ValueError(
            f"{name} must be ({size},) on {device}, got {tuple(value.shape)} on {value.device}"
        )


def check_pairs(name: str, value: Tensor | None, N: int, M: int, device: torch.device) -> None:
    """None or an (N, M) bool tensor."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {getattr(value, 'dtype', type(value))}")
    if value.shape != (N, M) or value.device != device:
        raise ValueError(
            f"{name} must be ({N}, {M}) on {device}, got {tuple(value.shape)} on {value.device}"
        )


def check_labels_in_range(name: str, target: Tensor, classes: int, ignore_index: int) -> None:
    if values_are_checked(target):
        outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if bool(outside.any()):
            first = int(target[outside][0])
            raise ValueError(
                f"{name} must be in [0, {classes}) or ignore_index = {ignore_index}, got {first}"
            )


def on_the_diagonal(x: Tensor, N: int, M: int, columns: bool) -> Targets:
    """Pair (i, i) is the positive of row i."""
    ones = x.new_ones(N, dtype=accumulation(x.dtype))
    column_share = x.new_ones(M, dtype=ones.dtype) if columns else None
    return Targets(torch.arange(N, device=x.device), ones, column_share)


def two_views(x: Tensor) -> Targets:
    """Rows i and i + N/2 are views of one sample; a row is no pair with itself."""
    N = x.shape[0]
    rows = torch.arange(N, device=x.device)
    target = torch.where(rows < N // 2, rows + N // 2, rows - N // 2)
    ones = x.new_ones(N, dtype=accumulation(x.dtype))
    return Targets(target, ones, exclude_diagonal=True)


def of_equal_labels(
    x: Tensor, labels: Tensor, column_labels: Tensor, columns: bool, exclude_diagonal: bool
) -> Targets:
    dtype = accumulation(x.dtype)
    row_share = shares(occurrences(labels, column_labels) - int(exclude_diagonal), dtype)
    column_share = shares(occurrences(column_labels, labels), dtype) if columns else None
    return Targets(
        labels, row_share, column_share, column_labels, exclude_diagonal=exclude_diagonal
    )


def of_matrix(x: Tensor, positives: Tensor, columns: bool, exclude_diagonal: bool) -> Targets:
    dtype = accumulation(x.dtype)
    own = positives.diagonal().to(torch.int64) if exclude_diagonal else 0
    row_share = shares(positives.sum(1) - own, dtype)
    column_share = shares(positives.sum(0), dtype) if columns else None
    target = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return Targets(target, row_share, column_share, None, positives, exclude_diagonal)


def occurrences(values: Tensor, among: Tensor) -> Tensor:
    """How often each value is in the other tensor."""
    ordered = among.sort().values
    ends = [torch.searchsorted(ordered, values.contiguous(), right=r) for r in (True, False)]
    return ends[0] - ends[1]


def shares(count: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(count > 0, 1.0 / count.clamp(min=1), 0.0).to(dtype)


def contrastive_targets(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    labels: Tensor | tuple[Tensor, Tensor] | None,
    positives: Tensor | None,
    symmetric: bool,
) -> Targets:
    """The positives of ``weft.contrastive_loss``; y is None where x is compared with itself."""
    if kind not in ("infonce", "supcon", "sigmoid"):
        raise ValueError(f"kind must be 'infonce', 'supcon' or 'sigmoid', got {kind!r}")
    check_rows(x, x if y is None else y)
    own = y is None
    if own and (symmetric or kind == "sigmoid"):
        raise ValueError(f"y must be given for {'symmetric' if symmetric else kind}")
    if kind == "sigmoid" and symmetric:
        raise ValueError("symmetric: the sigmoid loss is the same of rows and of columns")
    N, M = x.shape[0], (x if own else y).shape[0]
    if labels is not None and positives is not None:
        raise ValueError("labels and positives exclude each other")
    if labels is not None or positives is not None:
        if kind == "infonce":
            raise ValueError("labels and positives go with supcon and sigmoid, not with infonce")
        if positives is not None:
            check_pairs("positives", positives, N, M, x.device)
            of = of_matrix(x, positives, symmetric, own)
        else:
            rows, columns = labels if isinstance(labels, (tuple, list)) else (labels, labels)
            check_index("labels", rows, N, x.device)
            check_index("labels of y", columns, M, x.device)
            of = of_equal_labels(x, rows, columns, symmetric, own)
    elif kind == "supcon":
        raise ValueError("labels or positives must be given for supcon")
    elif own:
        if N % 2:
            raise ValueError(f"x must have two views of each sample without y, got {N} rows")
        of = two_views(x)
    else:
        if M < N or (symmetric and M != N):
            raise ValueError(
                f"y must have {'as many' if symmetric else 'at least as many'} rows as x, {N}, "
                f"got {M}"
            )
        of = on_the_diagonal(x, N, M, symmetric)
    if kind == "sigmoid":  # a sum over pairs, not a mean over positives
        ones = torch.ones_like(of.row_share)
        of = Targets(of.target, ones, None, of.column_labels, of.positives)
    return of


def scale_of(temperature: float | Tensor, x: Tensor) -> tuple[float, Tensor | None]:
    """1/τ as a number and, for a tensor, as a 0-d tensor beside it."""
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be finite and > 0, got {temperature}")
        return 1.0 / temperature, None
    _check_scalar("temperature", temperature, x)
    if values_are_checked(temperature) and not 0 < temperature.item() < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature.item()}")
    return 1.0, temperature.to(accumulation(x.dtype)).reciprocal()


def bias_of(bias: float | Tensor | None, kind: str, M: int, x: Tensor) -> Tensor | None:
    """The one number b as a bias of every column."""
    if bias is None:
        return None
    if kind != "sigmoid":
        raise ValueError(f"bias goes with sigmoid: it would not change {kind}")
    dtype = accumulation(x.dtype)
    if isinstance(bias, Tensor):
        _check_scalar("bias", bias, x)
        return bias.to(dtype).expand(M).contiguous()
    return x.new_full((M,), float(bias), dtype=dtype)


def _check_scalar(name: str, value: Tensor, x: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if value.dim() != 0 or value.device != x.device:
        raise ValueError(
            f"{name} must be a number or 0-d on {x.device}, got {tuple(value.shape)} on "
            f"{value.device}"
        )


def checked_weights(weights: Tensor | None, x: Tensor) -> Tensor | None:
    """(N,) floating, in the accumulation dtype."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(
            f"weights must be a floating tensor, got {getattr(weights, 'dtype', type(weights))}"
        )
    if weights.shape != (x.shape[0],) or weights.device != x.device:
        raise ValueError(
            f"weights must be ({x.shape[0]},) on {x.device}, got {tuple(weights.shape)} on "
            f"{weights.device}"
        )
    return weights.to(accumulation(x.dtype))
