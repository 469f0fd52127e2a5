r"""Dropout that is a function of a seed and of the place, the same in every kernel.

h(x) is the finalizer of MurmurHash3 for 32 bits. With the halves lo, hi of the seed and
b = batch · heads + head, arithmetic modulo 2³²,

.. math::
    u_{bij} = h(h(h(lo \oplus 2654435761 b) \oplus hi \oplus 2246822519 i) \oplus 3266489917 j)

and a weight is kept where :math:`u \ge \lfloor 2^{32} p \rfloor`.
"""

import torch
from torch import Tensor

BITS = 0xFFFFFFFF
OF_HEAD, OF_QUERY, OF_KEY = 2654435761, 2246822519, 3266489917


def mix(x: Tensor) -> Tensor:
    """h of int64 numbers in [0, 2³²)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & BITS
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & BITS
    return x ^ (x >> 16)


def kept(seed: Tensor, B: int, H: int, rows: slice, Nk: int, p: float) -> Tensor:
    """(B, H, rows, Nk) bool, of a seed () int64."""
    device = seed.device
    count = lambda n: torch.arange(n, device=device)  # noqa: E731
    head = (count(B * H) * OF_HEAD & BITS).reshape(B, H, 1, 1)
    query = torch.arange(rows.start, rows.stop, device=device)[:, None] * OF_QUERY & BITS
    key = count(Nk) * OF_KEY & BITS
    low, high = seed & BITS, (seed >> 32) & BITS
    u = mix(mix(mix(low ^ head) ^ high ^ query) ^ key)
    return u >= int(p * 2**32)
