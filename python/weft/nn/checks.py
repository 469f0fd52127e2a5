"""Checks of arguments that several layers make."""

import torch
from torch import Tensor

from weft.ops.checks import values_are_checked


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {size!r}")


def check_features(name: str, x: Tensor, features: int | None = None) -> None:
    """A floating-point tensor whose last dimension is ``features``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}"
        )
    if x.dim() < 1 or (features is not None and x.shape[-1] != features):
        D = "D" if features is None else features
        raise ValueError(f"{name} must be (..., {D}), got {tuple(x.shape)}")


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...], num_classes: int) -> None:
    """Class indices: int64, in ``[0, num_classes)`` where values are checked."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = getattr(labels, "dtype", type(labels))
        raise TypeError(f"{name} must be an int64 tensor, got {kind}")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(labels.shape)}")
    if values_are_checked(labels) and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must be in [0, {num_classes}), got {low} to {high}")


def check_label_vector(name: str, labels: Tensor, x: Tensor) -> None:
    """A label, of any value, for each row of x."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = getattr(labels, "dtype", type(labels))
        raise TypeError(f"{name} must be an int64 tensor, got {kind}")
    if labels.shape != x.shape[:1] or labels.device != x.device:
        raise ValueError(
            f"{name} must be ({len(x)},) on {x.device}, "
            f"got {tuple(labels.shape)} on {labels.device}"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Statistics, distances and norms are computed in float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast: a distance or a moment does not survive half precision."""
    return torch.autocast(x.device.type, enabled=False)
