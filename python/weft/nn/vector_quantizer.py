"""A codebook that features are rounded to, learned by moving averages or by gradients."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import check_features, check_sizes, full_precision
from weft.ops.pairwise.nearest import nearest


class Quantized(NamedTuple):
    """``values`` in the shape of the features, ``indices`` without their last dimension, ``loss``
    and ``perplexity`` ``()``."""

    values: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor


class VectorQuantizer(nn.Module):
    r"""Replaces each feature by the nearest code of a codebook.

    .. math::
        q(z) = e_k, \; k = \mathrm{argmin}_j \lVert z - e_j \rVert^2, \qquad
        \text{loss} = \beta \, \lVert z - \mathrm{sg}[e_k] \rVert^2
            + [\text{decay is None}] \, \lVert \mathrm{sg}[z] - e_k \rVert^2

    with the squared norms averaged over all elements. The gradient of the values passes straight
    through to the features. With a ``decay`` the codes are moving averages of the features that
    chose them, updated in training by each call:

    .. math::
        N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \quad
        m_k \leftarrow \gamma m_k + (1 - \gamma) \sum_{k(i) = k} z_i, \quad
        e_k = m_k / \tilde N_k, \quad
        \tilde N_k = \frac{N_k + \epsilon}{N + K \epsilon} N, \; N = \sum_k N_k

    Sums by code are sums over segments of the sorted features, in a fixed order: they repeat bit
    for bit, and no matrix of one-hot rows is formed. With ``decay=None`` the codebook is a
    parameter that the second term of the loss trains.

    Args:
        num_codes: K.
        dim: D.
        decay: gamma, from 0 to 1 (excluded), or None.
        commitment: beta, >= 0.
        eps: epsilon, > 0: keeps a code that nothing chooses from division by 0.
        restart_below: with a decay, codes with N_k below this become random features of the batch
            (dead codes are of no use); 0 never restarts.
        group: process group over which the counts and sums are added, so that all ranks keep one
            codebook; None keeps them local.
        device, dtype: of the codebook.

    Attributes:
        codebook: ``(K, D)``, a buffer with a decay, else a parameter.
        count, total: N ``(K,)`` and m ``(K, D)``, buffers; None without a decay. They begin at 1
            and at the codebook.

    Shapes: features ``(..., D)``; the result is a named tuple of ``values`` ``(..., D)``,
    ``indices`` ``(...)`` int64, ``loss`` and ``perplexity``, the exponential of the entropy of the
    codes' use in this batch, from 1 to K.

    Raises:
        ValueError: sizes or numbers out of range, features of another size, a group or restarts
            without a decay.
        TypeError: features that are not floating-point.

    Source: van den Oord et al., "Neural Discrete Representation Learning", NeurIPS 2017, equations
    1 to 3 and appendix A.1; restarts: Dhariwal et al., "Jukebox: A Generative Model for Music",
    2020, section 4.1.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        eps: float = 1e-5,
        restart_below: float = 0.0,
        group: dist.ProcessGroup | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(num_codes=num_codes, dim=dim)
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must be None or in [0, 1), got {decay}")
        if not commitment >= 0:
            raise ValueError(f"commitment must be >= 0, got {commitment}")
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        if not restart_below >= 0:
            raise ValueError(f"restart_below must be >= 0, got {restart_below}")
        if decay is None and (restart_below or group is not None):
            raise ValueError("restart_below and group go with a decay")
        self.num_codes, self.dim, self.decay = num_codes, dim, decay
        self.commitment, self.eps = float(commitment), float(eps)
        self.restart_below, self.group = float(restart_below), group
        codebook = torch.empty(num_codes, dim, device=device, dtype=dtype)
        if decay is None:
            self.codebook = nn.Parameter(codebook)
            self.count = self.total = None
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("count", codebook.new_empty(num_codes))
            self.register_buffer("total", torch.empty_like(codebook))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Codes of the standard normal distribution."""
        nn.init.normal_(self.codebook)
        if self.decay is not None:
            self.count.fill_(1)
            self.total.copy_(self.codebook)

    def forward(self, z: Tensor) -> Quantized:
        check_features("z", z, self.dim)
        with full_precision(z):
            rows = z.reshape(-1, self.dim).to(self.codebook.dtype)
            indices = nearest(rows.detach(), self.codebook.detach()).indices[:, 0]
            codes = F.embedding(indices, self.codebook)
            commitment = mean_square(rows - codes.detach())
            loss = self.commitment * commitment
            if self.decay is None:
                loss = loss + mean_square(rows.detach() - codes)
            # z − sg[z] is 0, so the values are the codes to the last bit, and its derivative is 1.
            values = (codes.detach() + (rows - rows.detach())).to(z.dtype)
            counts = torch.bincount(indices, minlength=self.num_codes).to(rows.dtype)
            if self.decay is not None and self.training:
                self._update(rows.detach(), indices, counts)
        share = counts / max(len(rows), 1)
        perplexity = torch.special.entr(share).sum().exp()
        return Quantized(values.view(z.shape), indices.view(z.shape[:-1]), loss, perplexity)

    @torch.no_grad()
    def _update(self, rows: Tensor, indices: Tensor, counts: Tensor) -> None:
        sums = segment_sums(rows, indices, counts)
        counts = counts.clone()
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
            dist.all_reduce(sums, group=self.group)
        self.count.lerp_(counts, 1 - self.decay)
        self.total.lerp_(sums, 1 - self.decay)
        N = self.count.sum()
        smoothed = (self.count + self.eps) / (N + self.num_codes * self.eps) * N
        self.codebook.copy_(self.total / smoothed[:, None])
        if self.restart_below and len(rows):
            self._restart(rows)

    def _restart(self, rows: Tensor) -> None:
        chosen = rows[torch.randint(len(rows), (self.num_codes,), device=rows.device)]
        if self.group is not None:  # one codebook on all ranks
            dist.broadcast(chosen, dist.get_global_rank(self.group, 0), group=self.group)
        dead = self.count < self.restart_below
        self.count.masked_fill_(dead, 1)
        for kept in (self.codebook, self.total):
            kept.copy_(torch.where(dead[:, None], chosen, kept))

    def decode(self, indices: Tensor) -> Tensor:
        """The codes ``(..., D)`` of ``indices`` ``(...)``."""
        return F.embedding(indices, self.codebook)

    def extra_repr(self) -> str:
        return (
            f"num_codes={self.num_codes}, dim={self.dim}, decay={self.decay}, "
            f"commitment={self.commitment}"
        )


def mean_square(x: Tensor) -> Tensor:
    return x.square().sum() / max(x.numel(), 1)


def segment_sums(x: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Sums of the rows of x by label, ``(N, D)`` -> ``(K, D)``; ``counts`` are the rows of each."""
    order = labels.argsort(stable=True)
    return torch.segment_reduce(x[order], "sum", lengths=counts.long(), initial=0)
