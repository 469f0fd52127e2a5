"""Heads and grids: what the attention layers here have in common."""

import torch
from torch import Tensor

from weft.nn.checks import check_features, check_sizes


def check_heads(dim: int, num_heads: int) -> None:
    check_sizes(dim=dim, num_heads=num_heads)
    if dim % num_heads:
        raise ValueError(f"dim must be a multiple of num_heads = {num_heads}, got {dim}")


def size_pair(name: str, size: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    """Height and width, from one integer where both are the same."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"{name} must be one or two integers >= {least}, got {size!r}")
    return pair


def check_tokens(name: str, x: Tensor, dim: int, length: int | None = None) -> None:
    """``(B, N, dim)``, with N = ``length`` where that is known."""
    check_features(name, x)
    if x.dim() != 3 or x.shape[2] != dim or (length is not None and x.shape[1] != length):
        N = "N" if length is None else length
        raise ValueError(f"{name} must be (B, {N}, {dim}), got {tuple(x.shape)}")


def check_grid(name: str, x: Tensor, dim: int) -> None:
    """``(B, H, W, dim)`` with at least one place."""
    check_features(name, x)
    if x.dim() != 4 or x.shape[3] != dim or 0 in x.shape[1:3]:
        raise ValueError(f"{name} must be (B, H, W, {dim}) with H, W >= 1, got {tuple(x.shape)}")


def check_map(name: str, x: Tensor, channels: int) -> None:
    """``(B, channels, H, W)`` with at least one place."""
    check_features(name, x)
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(
            f"{name} must be (B, {channels}, H, W) with H, W >= 1, got {tuple(x.shape)}"
        )


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, N, H D)`` -> ``(B, H, N, D)``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``(B, H, N, D)`` -> ``(B, N, H D)``."""
    return x.transpose(1, 2).flatten(2)


def grid_offsets(height: int, width: int, device=None) -> tuple[Tensor, Tensor]:
    """Row and column of key j minus those of query i, each ``(N, N)`` int64, N = height width."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return rows - rows[:, None], columns - columns[:, None]
