"""Biases of attention that are given by fewer numbers than one for each pair."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.ops.attention.inputs import check_beside, check_bias
from weft.ops.attention.relative_bias import relative_bias


class Bias:
    """What ``weft.attention`` takes as ``bias`` beside a tensor."""

    def to_dense(self) -> Tensor:
        """The bias as a tensor that broadcasts to (B, H, Nq, Nk), differentiable."""
        raise NotImplementedError


@dataclass(frozen=True)
class RelativeBias(Bias):
    r"""A learned table read by relative position:
    :math:`\text{bias}_{hij} = \text{table}_{\text{index}_{ij}, h}`.

    Swin's window table, T5's buckets, the output of a position network. The gradient of the table
    adds the pairs of an entry in a fixed order: the same bits at every run.

    Args:
        table: ``(T, H)`` float, with gradient.
        index: ``(Nq, Nk)`` int64 in [0, T).

    Source: Liu et al., "Swin Transformer", ICCV 2021, equation 4.
    """

    table: Tensor
    index: Tensor

    def to_dense(self) -> Tensor:
        return relative_bias(self.table, self.index)


@dataclass(frozen=True)
class DistanceBias(Bias):
    r"""A mixture of Gaussians of the distance of two places of a grid:

    .. math::
        \text{bias}_{hij} = \sum_m \text{weight}_{hm}
        \exp\left(-\frac{\lVert p_i - p_j \rVert^2}{2 \sigma_{hm}^2}\right)

    with p the integer coordinates of the queries and keys of ``shape`` in row-major order, after
    ``extra`` tokens (a class token) that have no place and a bias of 0.

    Args:
        weight: ``(H, M)``, with gradient.
        sigma: ``(H, M)``, in steps of the grid, not 0, with gradient.
        shape: sizes of the grid.
        extra: tokens before those of the grid.
    """

    weight: Tensor
    sigma: Tensor
    shape: Sequence[int]
    extra: int = 0

    def __post_init__(self):
        if self.weight.dim() != 2 or self.weight.shape != self.sigma.shape:
            raise ValueError(
                f"weight and sigma must be (H, M) both, got {tuple(self.weight.shape)} and "
                f"{tuple(self.sigma.shape)}"
            )
        if self.extra < 0:
            raise ValueError(f"extra must be >= 0, got {self.extra}")

    def to_dense(self) -> Tensor:
        # Of each difference of places once; the table of them is read by all pairs.
        device, reach = self.weight.device, [2 * n - 1 for n in self.shape]
        differences = [torch.arange(1 - n, n, device=device) for n in self.shape]
        squared = torch.cartesian_prod(*differences).reshape(-1, len(reach)).square().sum(1)
        exponent = squared[:, None, None] * (-0.5 / self.sigma.square())
        table = (self.weight * exponent.to(self.weight.dtype).exp()).sum(2)
        places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in self.shape))
        places = places.reshape(-1, len(reach))
        index = torch.zeros(1, dtype=torch.int64, device=device)
        for axis, n in enumerate(reach):
            own = places[:, axis]
            index = n * index + own[:, None] - own + n // 2
        bias = relative_bias(table, index)
        return torch.nn.functional.pad(bias, (self.extra, 0, self.extra, 0))


@dataclass(frozen=True)
class LowRankBias(Bias):
    r""":math:`\text{bias} = U V^\top`, of ``(B, H, Nq, R)`` and ``(B, H, Nk, R)``.

    Never a matrix: R more columns of query and key. With a softcap, which must not act on it, it is
    formed all the same.
    """

    u: Tensor
    v: Tensor

    def __post_init__(self):
        if self.u.dim() != 4 or self.v.dim() != 4 or self.u.shape[3] != self.v.shape[3]:
            raise ValueError(
                "u and v must be (B, H, Nq, R) and (B, H, Nk, R), got "
                f"{tuple(self.u.shape)} and {tuple(self.v.shape)}"
            )

    def to_dense(self) -> Tensor:
        return self.u @ self.v.mT


def with_bias(
    bias: Tensor | Bias | None, query: Tensor, key: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query and key, perhaps with more columns, and the bias checked, with 4 dimensions."""
    if bias is None:
        return query, key, None
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if isinstance(bias, LowRankBias) and not softcap and scale and key.shape[1] == query.shape[1]:
        return *_widened(bias, query, key, scale), None
    if isinstance(bias, Bias):
        bias = bias.to_dense()
    if not isinstance(bias, Tensor):
        raise TypeError(
            "bias must be a tensor, a RelativeBias, a DistanceBias or a LowRankBias, "
            f"got {type(bias).__name__}"
        )
    return query, key, check_bias(bias, query, shape)


def _widened(bias: LowRankBias, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """scale ⟨(q, u / scale), (k, v)⟩ = scale ⟨q, k⟩ + ⟨u, v⟩."""
    parts = []
    for name, t, factor, x in (("u", query, 1 / scale, bias.u), ("v", key, 1.0, bias.v)):
        check_beside(f"bias.{name}", x, query)
        if any(n != 1 and n != m for n, m in zip(x.shape[:3], t.shape[:3], strict=True)):
            raise ValueError(
                f"bias.{name} must broadcast to {tuple(t.shape[:3])} and its rank, "
                f"got {tuple(x.shape)}"
            )
        columns = (x * factor).to(t.dtype).expand(*t.shape[:3], x.shape[3])
        parts.append(torch.cat([t, columns], 3))
    return parts[0], parts[1]
