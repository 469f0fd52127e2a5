"""Checks of arguments, made before any kernel runs, and the casts of autocast."""

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.registration import FLOATS

_check_values = False


def check_values(enabled: bool) -> None:
    """Whether the *values* of CUDA tensors (labels, dims, offsets) are checked too.

    Values are always checked on the CPU. On a GPU a check waits for the device, so it is off until
    asked for; results of bad values are then defined, never an access out of bounds.
    """
    global _check_values
    _check_values = bool(enabled)


def values_are_checked(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.is_meta or transformed():
        return False
    return tensor.device.type == "cpu" or _check_values


def check_float(**tensors: Tensor) -> None:
    """All are tensors of one floating dtype on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}"
            )


def check_dims(dims: Tensor | None, C: int, k: int, device: torch.device) -> None:
    """Subspace dimensions of C classes, at most k: None or ``(C,)`` int64."""
    if dims is None:
        return
    if not isinstance(dims, Tensor) or dims.dtype != torch.int64:
        raise TypeError(f"dims must be an int64 tensor, got {getattr(dims, 'dtype', type(dims))}")
    if dims.shape != (C,) or dims.device != device:
        raise ValueError(
            f"dims must be ({C},) on {device}, got {tuple(dims.shape)} on {dims.device}"
        )
    if values_are_checked(dims) and C and not 0 <= int(dims.min()) <= int(dims.max()) <= k:
        raise ValueError(f"dims must be in [0, {k}], got {int(dims.min())} to {int(dims.max())}")


def check_orthonormal(name: str, bases: Tensor, dims: Tensor | None = None) -> None:
    """``bases[..., :, j]`` are orthonormal; columns from ``dims`` on are not looked at."""
    columns = bases.double() if bases.dtype == torch.float64 else bases.float()
    D, k = columns.shape[-2:]
    identity = torch.eye(k, dtype=columns.dtype, device=columns.device)
    if dims is not None:
        used = torch.arange(k, device=columns.device) < dims[..., None]
        columns = columns.masked_fill(~used[..., None, :], 0)
        identity = identity * used[..., None, :]
    error = (columns.mT @ columns - identity).abs().amax() if columns.numel() else 0.0
    tolerance = 8 * max(D, 1) ** 0.5 * torch.finfo(bases.dtype).eps
    if not error <= tolerance:  # a NaN is no basis either
        raise ValueError(
            f"{name} must have orthonormal columns: max |SᵀS − I| is {float(error):.3g}, "
            f"more than {tolerance:.3g}"
        )


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under ``torch.autocast``, its lower dtype for the float tensors of a matrix product.

    ``torch.library.register_autocast`` knows one fixed dtype per device; this takes what is asked.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    lower = lambda t: t.to(dtype) if t is not None and t.is_floating_point() else t  # noqa: E731
    return tuple(t if t is not None and t.dtype == torch.float64 else lower(t) for t in tensors)
