"""Attention among the columns of a table: fields of a record, variates of a time series."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.attention.heads import check_heads, check_tokens, merge_heads, split_heads
from weft.nn.checks import check_features, check_sizes
from weft.ops.attention.attention import attention


class InteractingLayer(nn.Module):
    r"""AutoInt's interacting layer: each field combines with the fields that it attends to.

    .. math::
        \tilde e_m = \Big[ \sum_k \mathrm{softmax}_k
            \big(\langle W^h_Q e_m, W^h_K e_k \rangle\big) \, W^h_V e_k \Big]_h, \qquad
        \text{out}_m = \mathrm{ReLU}(\tilde e_m + W_{\text{Res}} \, e_m)

    A stack of L layers models interactions of up to :math:`2^L` fields. The scores are not scaled.
    (The authors' TensorFlow code scales them, and has ReLUs and a norm that the paper has not.)

    Args:
        in_features: d, of the field embeddings.
        out_features: width of the result over all heads, a multiple of num_heads.
        num_heads: H.
        residual: whether there is :math:`W_{\text{Res}}`.
        device, dtype: of the parameters.

    Shapes: ``(B, M, d)`` of M fields to ``(B, M, out_features)``. ``mask``, True for fields that
    are there: as in :func:`weft.attention`, of ``(B, H, M, M)``.

    Raises:
        ValueError: sizes, embeddings of another shape.
        TypeError: embeddings that are not floating-point.

    Source: Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural
    Networks", CIKM 2019, equations 5 to 8.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int = 2,
        *,
        residual: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, num_heads=num_heads)
        if out_features % num_heads:
            raise ValueError(
                f"out_features must be a multiple of num_heads = {num_heads}, got {out_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.num_heads, self.residual = num_heads, residual
        parts = 4 if residual else 3
        factory = {"device": device, "dtype": dtype}
        self.weights = nn.Linear(in_features, parts * out_features, bias=False, **factory)
        for part in self.weights.weight.data.split(out_features):
            nn.init.xavier_uniform_(part)

    def forward(self, x: Tensor, *, mask=None) -> Tensor:
        check_tokens("x", x, self.in_features)
        parts = self.weights(x).split(self.out_features, -1)
        query, key, value = (split_heads(t, self.num_heads) for t in parts[:3])
        out = merge_heads(attention(query, key, value, mask=mask, scale=1.0))
        return F.relu(out + parts[3] if self.residual else out)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_heads={self.num_heads}, residual={self.residual}"
        )


class InvertedBlock(nn.Module):
    r"""iTransformer's block: attention among variates, then a network for each variate.

    .. math::
        y = \text{LN}(x + \text{MHA}(x)), \qquad
        \text{out} = \text{LN}(y + W_2 \, \phi(W_1 y))

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        hidden: width of the feed-forward network; default 4 C.
        dropout: behind the attention, its weights included, and twice in the network.
        device, dtype: of the parameters.

    Shapes: ``(B, N, C)`` of N variates to the same; ``mask``: as in :func:`weft.attention`.

    Raises:
        ValueError: sizes, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series
    Forecasting", ICLR 2024, section 3.2; the function is GELU.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        hidden: int | None = None,
        *,
        dropout: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        hidden = 4 * dim if hidden is None else hidden
        check_sizes(hidden=hidden)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dim, self.num_heads, self.dropout = dim, num_heads, float(dropout)
        factory = {"device": device, "dtype": dtype}
        self.qkv, self.proj = (nn.Linear(dim, n * dim, **factory) for n in (3, 1))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, **factory) for _ in range(2))
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor, *, mask=None) -> Tensor:
        check_tokens("x", x, self.dim)
        heads = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        out = attention(*heads, mask=mask, dropout_p=self.dropout if self.training else 0.0)
        x = self.norm1(x + self._drop(self.proj(merge_heads(out))))
        hidden = self._drop(F.gelu(self.fc1(x)))
        return self.norm2(x + self._drop(self.fc2(hidden)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, dropout={self.dropout}"


class InvertedForecaster(nn.Module):
    r"""iTransformer: each variate's whole past is one token; tokens attend; each is forecast.

    .. math::
        h^0_n = W_E \, \frac{x_{:,n} - \mu_n}{\sigma_n} + b_E, \qquad
        h^{l+1} = \text{block}_l(h^l), \qquad
        \hat y_{:,n} = \sigma_n \, (W_P \, \text{LN}(h^L_n) + b_P) + \mu_n

    with mean and deviation of each series (:math:`\sigma^2_n` is its variance plus 1e-5; the mean
    has no gradient). There is no position: variates are a set, and their number may change.

    Args:
        past: T, time steps that are seen.
        future: S, time steps that are forecast.
        dim, num_heads, hidden, dropout: of each :class:`InvertedBlock`.
        num_layers: L.
        normalize: whether series are normalized, and forecasts brought back.
        device, dtype: of the parameters.

    Shapes: series ``(B, T, N)`` and covariates ``(B, T, M)`` or None, which are tokens like others
    but neither normalized nor forecast, give ``(B, S, N)``.

    Raises:
        ValueError: sizes, series of another shape.
        TypeError: series that are not floating-point.

    Source: Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series
    Forecasting", ICLR 2024, equation 1 and section 3, with the authors' normalization.
    """

    def __init__(
        self,
        past: int,
        future: int,
        dim: int = 512,
        num_layers: int = 2,
        num_heads: int = 8,
        hidden: int | None = None,
        *,
        dropout: float = 0.1,
        normalize: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(past=past, future=future, dim=dim, num_layers=num_layers)
        factory = {"device": device, "dtype": dtype}
        self.past, self.future, self.normalize = past, future, normalize
        self.embedding = nn.Linear(past, dim, **factory)
        self.dropout = nn.Dropout(dropout)
        blocks = (
            InvertedBlock(dim, num_heads, hidden, dropout=dropout, **factory)
            for _ in range(num_layers)
        )
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, **factory)
        self.projector = nn.Linear(dim, future, **factory)

    def forward(self, series: Tensor, covariates: Tensor | None = None) -> Tensor:
        self._check("series", series)
        N = series.shape[2]
        mean, deviation = 0.0, 1.0
        if self.normalize:
            mean = series.mean(1, keepdim=True).detach()
            series = series - mean
            centered = series - series.mean(1, keepdim=True)
            deviation = (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
            series = series / deviation
        if covariates is not None:
            self._check("covariates", covariates)
            if covariates.shape[0] != series.shape[0]:
                raise ValueError(
                    f"covariates must have the batch of series, {series.shape[0]}, "
                    f"got {covariates.shape[0]}"
                )
            series = torch.cat([series, covariates], 2)
        x = self.dropout(self.embedding(series.mT))
        for block in self.blocks:
            x = block(x)
        return self.projector(self.norm(x[:, :N])).mT * deviation + mean

    def _check(self, name: str, x: Tensor) -> None:
        check_features(name, x)
        if x.dim() != 3 or x.shape[1] != self.past:
            raise ValueError(f"{name} must be (B, {self.past}, N), got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"past={self.past}, future={self.future}, normalize={self.normalize}"
