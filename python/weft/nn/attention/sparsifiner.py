"""Self-attention whose pairs are predicted, for each image, by a cheap model of low rank."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.attention.heads import check_heads, check_tokens, merge_heads, split_heads
from weft.nn.checks import check_sizes
from weft.ops.attention.attention import attention


class ConnectivityPredictor(nn.Module):
    r"""Predicts which keys each patch attends to.

    .. math::
        A^{\text{down}} = \mathrm{softmax}\big(s \, Q W_q (W_{\text{down}}^\top K W_k)^\top\big),
        \qquad A^{\text{up}} = [A^{\text{down}}] \, [\,|W_{\text{up}}^\top|\,], \qquad
        M_{ij} = A^{\text{up}}_{ij} \text{ is of the largest of row } i, \text{ or } > \tau

    for each head, where brackets set all but the largest entries to 0: N keys are mixed into R, and
    each patch combines few of R sparse learned patterns of connectivity. The class token, which
    comes first, attends to everything.

    M has no gradient. The predictor learns from :meth:`approximate`, which is compared with the
    matrix of full attention, of the same or of a trained model.

    Args:
        head_dim: D, of queries and keys.
        num_tokens: N, with the class token; the mixtures are of fixed places.
        num_heads: H.
        keep: rate of the N keys that a patch keeps, in (0, 1]: :math:`\lceil \text{keep} N \rceil`;
            None cuts at ``threshold`` in its place.
        threshold: tau >= 0, used where keep is None. A patch may then keep no key.
        rank: R; default N // 8.
        reduced_dim: width behind W_q and W_k; default D // 2.
        num_basis: how many of R patterns a patch combines; None keeps those with a coefficient
            above ``coefficient_threshold``.
        coefficient_threshold, basis_threshold: coefficients, and entries of the patterns, up to
            this are 0.
        device, dtype: of the parameters.

    Attributes:
        proj_c_q, proj_c_k, proj_n, proj_back_n: :math:`W_q, W_k, W_{\text{down}}, W_{\text{up}}`,
            named as in the authors' code; the scale s there, and here, is :math:`1/\sqrt H`.

    Shapes: query and key ``(B, H, N, D)`` give the mask ``(B, H, N, N)`` bool.

    Raises:
        ValueError: sizes and numbers out of range, queries or keys of another shape.

    Source: Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient
    Vision Transformers", CVPR 2023, section 3.2, with the rules of the authors' code.
    """

    def __init__(
        self,
        head_dim: int,
        num_tokens: int,
        num_heads: int = 8,
        *,
        keep: float | None = 0.25,
        threshold: float = 0.0,
        rank: int | None = None,
        reduced_dim: int | None = None,
        num_basis: int | None = None,
        coefficient_threshold: float = 0.0,
        basis_threshold: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        rank = max(num_tokens // 8, 1) if rank is None else rank
        reduced_dim = max(head_dim // 2, 1) if reduced_dim is None else reduced_dim
        check_sizes(head_dim=head_dim, num_tokens=num_tokens, num_heads=num_heads, rank=rank)
        check_sizes(reduced_dim=reduced_dim)
        if keep is not None and not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1] or None, got {keep}")
        if num_basis is not None and not (isinstance(num_basis, int) and 1 <= num_basis <= rank):
            raise ValueError(f"num_basis must be from 1 to rank = {rank}, got {num_basis!r}")
        thresholds = {
            "threshold": threshold,
            "coefficient_threshold": coefficient_threshold,
            "basis_threshold": basis_threshold,
        }
        for name, value in thresholds.items():
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self.head_dim, self.num_tokens, self.num_heads = head_dim, num_tokens, num_heads
        self.keep, self.threshold, self.num_basis = keep, float(threshold), num_basis
        self.coefficient_threshold = float(coefficient_threshold)
        self.basis_threshold = float(basis_threshold)
        factory = {"device": device, "dtype": dtype}
        self.proj_c_q = nn.Linear(head_dim, reduced_dim, **factory)
        self.proj_c_k = nn.Linear(head_dim, reduced_dim, **factory)
        self.proj_n = nn.Parameter(torch.empty(num_tokens, rank, **factory))
        self.proj_back_n = nn.Parameter(torch.empty(num_tokens, rank, **factory))
        for mixture in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(mixture, std=0.02)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        with torch.no_grad():
            coefficients = self._coefficients(query, key)
            if self.num_basis is not None:
                largest = coefficients.topk(self.num_basis, sorted=False).indices
                kept = torch.zeros_like(coefficients).scatter(-1, largest, 1)
                coefficients = coefficients * kept
            else:
                coefficients = F.threshold(coefficients, self.coefficient_threshold, 0.0)
            basis = F.threshold(self.proj_back_n.abs(), self.basis_threshold, 0.0)
            scores = coefficients @ basis.mT.to(coefficients.dtype)
            if self.keep is None:
                mask = scores > self.threshold
            else:
                count = math.ceil(self.keep * self.num_tokens)
                largest = scores.topk(count, sorted=False).indices
                mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, largest, True)
            return F.pad(mask, (0, 0, 1, 0), value=True)

    def approximate(self, query: Tensor, key: Tensor) -> Tensor:
        """What the predictor says the rows of the patches in the attention matrix are,
        ``(B, H, N - 1, N)``: nothing is cut, and W_up has its sign."""
        coefficients = self._coefficients(query, key)
        return coefficients @ self.proj_back_n.mT.to(coefficients.dtype)

    def _coefficients(self, query: Tensor, key: Tensor) -> Tensor:
        wanted = (self.num_heads, self.num_tokens, self.head_dim)
        for name, x in {"query": query, "key": key}.items():
            if x.dim() != 4 or tuple(x.shape[1:]) != wanted:
                raise ValueError(
                    f"{name} must be (B, {', '.join(map(str, wanted))}), got {tuple(x.shape)}"
                )
        query, key = self.proj_c_q(query[:, :, 1:]), self.proj_c_k(key)
        mixed = self.proj_n.mT.to(key.dtype) @ key
        return (query @ mixed.mT * self.num_heads**-0.5).softmax(-1)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_tokens={self.num_tokens}, num_heads={self.num_heads}, "
            f"keep={self.keep}, threshold={self.threshold}, num_basis={self.num_basis}, "
            f"coefficient_threshold={self.coefficient_threshold}, "
            f"basis_threshold={self.basis_threshold}"
        )


class SparsifinerAttention(nn.Module):
    r"""Self-attention over the pairs that :class:`ConnectivityPredictor` keeps.

    .. math::
        \text{out} = W_O \, \big[\mathrm{softmax}_{M_h}(Q_h K_h^\top / \sqrt D) \, V_h\big]_h

    The mask is packed into bits, and tiles that it empties are skipped. A patch that keeps no key
    gets the bias of the output layer.

    Args:
        dim: C.
        num_tokens: N, with the class token, which comes first.
        num_heads: H, a divisor of C.
        qkv_bias: whether query, key and value have a bias.
        device, dtype: of the parameters.
        **options: of :class:`ConnectivityPredictor`.

    Attributes:
        qkv, proj, mask_predictor: named as in the authors' code.

    Shapes: ``(B, N, C)`` to the same.

    Raises:
        ValueError: sizes and numbers out of range, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient
    Vision Transformers", CVPR 2023, section 3.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.mask_predictor = ConnectivityPredictor(
            dim // num_heads, num_tokens, num_heads, **factory, **options
        )
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._heads(x)
        mask = self.mask_predictor(query, key)
        return self.proj(merge_heads(attention(query, key, value, mask=mask)))

    def approximate(self, x: Tensor) -> Tensor:
        """The predicted attention of the patches, ``(B, H, N - 1, N)``, to be trained by
        ``torch.nn.functional.mse_loss`` against a matrix of full attention."""
        query, key, _ = self._heads(x)
        return self.mask_predictor.approximate(query, key)

    def _heads(self, x: Tensor) -> list[Tensor]:
        check_tokens("x", x, self.dim, self.mask_predictor.num_tokens)
        return [split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1)]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"
