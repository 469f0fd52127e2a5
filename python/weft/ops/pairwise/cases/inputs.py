"""Inputs that the cases of several ops share."""

import torch
from torch import Tensor

from weft.ops.cases import randn


def orthonormal(C: int, D: int, k: int, dtype, device, seed: int = 1) -> Tensor:
    """(C, D, k) in the layout of a layer: (C, k, D) in memory."""
    q = torch.linalg.qr(randn(C, D, k, dtype=torch.float64, seed=seed)).Q
    return q.mT.contiguous().to(device, dtype).mT
