"""Batches whose samples have different numbers of tokens, packed one after the other."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from weft.nn.checks import check_features


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of B samples: those of sample b are ``tokens[offsets[b] : offsets[b + 1]]``.

    Attributes:
        tokens: ``(T, C)``.
        offsets: ``(B + 1,)`` int64, from 0 to T.
        max_length: of the longest sample.
    """

    tokens: Tensor
    offsets: Tensor
    max_length: int

    def with_tokens(self, tokens: Tensor) -> "PackedTokens":
        """Other features of the same samples, ``(T, ...)``."""
        return replace(self, tokens=tokens)

    def split(self) -> list[Tensor]:
        """The tokens of each sample; the host waits for the lengths."""
        return list(self.tokens.split(self.offsets.diff().tolist()))


register_dataclass(PackedTokens)


def pack_tokens(x: Tensor, keep: Tensor) -> PackedTokens:
    """Packs the tokens that are kept, of each sample as many as it has.

    What a layer does with the rest of the batch then costs what is kept, not the longest sample;
    :func:`weft.attention_varlen` attends within each sample. The host waits for the lengths.

    Args:
        x: ``(B, N, C)``.
        keep: ``(B, N)`` bool; a class token has to be kept like others.

    Returns:
        :class:`PackedTokens`, with the gradient of x.

    Raises:
        ValueError: shapes.
        TypeError: x that is not floating-point, keep that is not bool.
    """
    check_features("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must be (B, N, C), got {tuple(x.shape)}")
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        raise TypeError(f"keep must be a bool tensor, got {getattr(keep, 'dtype', type(keep))}")
    if keep.shape != x.shape[:2]:
        raise ValueError(f"keep must be {tuple(x.shape[:2])}, got {tuple(keep.shape)}")
    lengths = keep.sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return PackedTokens(x[keep], offsets, int(lengths.max()) if len(lengths) else 0)
