"""Attention between two streams: frames and sentences, or two language models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.masks import Dense, Mask, Segments
from weft.nn.attention.heads import check_heads, check_tokens, merge_heads, split_heads
from weft.nn.checks import check_sizes
from weft.ops.attention.attention import attention


def alignment_mask(
    video_segments: Tensor,
    text_segments: Tensor,
    *,
    video_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
) -> Mask:
    """Frames see all frames, sentences all sentences, and each other at the same time only.

    Args:
        video_segments: ``(B, N)`` int64, the time segment of each frame; negative: none, as of a
            class token, which then sees no sentence.
        text_segments: ``(B, M)`` int64, of each sentence.
        video_valid, text_valid: ``(B, N)`` and ``(B, M)`` bool, False for padding, which nothing
            sees; None: all are there.

    Returns:
        A mask of N + M queries and keys, frames first: labels, never a matrix.

    Raises:
        ValueError: shapes.
        TypeError: segments that are not int64, validity that is not bool.

    Source: He et al., "Align and Attend: Multimodal Summarization with Dual Contrastive Losses",
    CVPR 2023, section 3.2.
    """
    for name, x in {"video_segments": video_segments, "text_segments": text_segments}.items():
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {getattr(x, 'dtype', type(x))}")
        if x.dim() != 2 or len(x) != len(video_segments):
            raise ValueError(
                f"{name} must have 2 dimensions and the batch of video_segments, "
                f"got {tuple(x.shape)}"
            )
    for name, x, like in (
        ("video_valid", video_valid, video_segments),
        ("text_valid", text_valid, text_segments),
    ):
        if x is not None and (not isinstance(x, Tensor) or x.dtype != torch.bool):
            raise TypeError(f"{name} must be a bool tensor, got {getattr(x, 'dtype', type(x))}")
        if x is not None and x.shape != like.shape:
            raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(x.shape)}")
    sizes = (video_segments.shape[1], text_segments.shape[1])
    kinds = torch.arange(2, device=video_segments.device)
    modality = torch.cat([k.expand(n) for k, n in zip(kinds, sizes, strict=True)])
    times = torch.cat([video_segments, text_segments], 1)
    # what has no time is the same as nothing: its labels differ between queries and keys
    aligned = Segments(times.clamp(min=-1), torch.where(times < 0, -2, times))
    mask = Segments(modality) | aligned
    if video_valid is None and text_valid is None:
        return mask
    valid = [
        torch.ones_like(segments, dtype=torch.bool) if given is None else given
        for given, segments in ((video_valid, video_segments), (text_valid, text_segments))
    ]
    return mask & Dense(torch.cat(valid, 1)[:, None, None])


class MultiwayBlock(nn.Module):
    r"""A2Summ's block: frames and sentences attend together, then each has its own network.

    .. math::
        [v', t'] = [v, t] + \text{MHA}_M(\text{LN}([v, t])), \qquad
        \text{out}_v = v' + \text{FFN}_v(\text{LN}_v(v')), \quad
        \text{out}_t = t' + \text{FFN}_t(\text{LN}_t(t'))

    with the mask M of :func:`weft.nn.alignment_mask`.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        hidden: width of the networks; default 4 C.
        dropout: of attention weights and outputs, and in the networks.
        device, dtype: of the parameters.

    Shapes: video ``(B, N, C)``, text ``(B, M, C)`` to the same; ``mask`` as in
    :func:`weft.attention`, of ``(B, H, N + M, N + M)``.

    Raises:
        ValueError: sizes, tokens of another shape.
        TypeError: tokens that are not floating-point.

    Source: He et al., "Align and Attend: Multimodal Summarization with Dual Contrastive Losses",
    CVPR 2023, section 3.2, as in the authors' code.
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
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.qkv, self.proj = (nn.Linear(dim, n * dim, **factory) for n in (3, 1))
        self.video, self.text = (self._network(hidden, factory) for _ in range(2))

    def _network(self, hidden: int, factory: dict) -> nn.Sequential:
        return nn.Sequential(
            nn.LayerNorm(self.dim, **factory),
            nn.Linear(self.dim, hidden, **factory),
            nn.GELU(),
            nn.Dropout(self.dropout),
            nn.Linear(hidden, self.dim, **factory),
            nn.Dropout(self.dropout),
        )

    def forward(self, video: Tensor, text: Tensor, *, mask=None) -> tuple[Tensor, Tensor]:
        check_tokens("video", video, self.dim)
        check_tokens("text", text, self.dim)
        if len(text) != len(video):
            raise ValueError(f"text must have the batch of video, {len(video)}, got {len(text)}")
        x = torch.cat([video, text], 1)
        heads = (split_heads(t, self.num_heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        out = attention(*heads, mask=mask, dropout_p=self.dropout if self.training else 0.0)
        x = x + F.dropout(self.proj(merge_heads(out)), self.dropout, self.training)
        video, text = x.split([video.shape[1], text.shape[1]], 1)
        return video + self.video(video), text + self.text(text)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, dropout={self.dropout}"


class CompositionBridge(nn.Module):
    r"""CALM's bridge: a layer of one frozen model attends to a layer of another.

    .. math::
        H_B' = H_B + \text{MHA}\big(Q = H_B, \; K = V = H_A W_{\text{proj}}\big)

    Only the bridge is trained. At a token that is generated the other model's states may be those
    of the whole prompt (``mask=None``) or of the tokens up to it (``weft.masks.Causal()``).

    Args:
        dim: width of the anchor model B.
        other_dim: width of the augmenting model A.
        num_heads: a divisor of dim.
        device, dtype: of the parameters.

    Attributes:
        project: :math:`W_{\text{proj}}`.

    Shapes: states of B ``(batch, N, dim)`` and of A ``(batch, M, other_dim)`` give
    ``(batch, N, dim)``; ``mask`` as in :func:`weft.attention`.

    Raises:
        ValueError: sizes, states of another shape.
        TypeError: states that are not floating-point.

    Source: Bansal et al., "LLM Augmented LLMs: Expanding Capabilities through Composition",
    ICLR 2024, section 3.2.
    """

    def __init__(self, dim: int, other_dim: int, num_heads: int = 8, *, device=None, dtype=None):
        super().__init__()
        check_heads(dim, num_heads)
        check_sizes(other_dim=other_dim)
        self.dim, self.other_dim, self.num_heads = dim, other_dim, num_heads
        factory = {"device": device, "dtype": dtype}
        self.project = nn.Linear(other_dim, dim, bias=False, **factory)
        self.query, self.key, self.value, self.out = (
            nn.Linear(dim, dim, bias=False, **factory) for _ in range(4)
        )

    def forward(self, x: Tensor, other: Tensor, *, mask=None) -> Tensor:
        check_tokens("x", x, self.dim)
        check_tokens("other", other, self.other_dim)
        if len(other) != len(x):
            raise ValueError(f"other must have the batch of x, {len(x)}, got {len(other)}")
        other = self.project(other)
        parts = (self.query(x), self.key(other), self.value(other))
        heads = (split_heads(t, self.num_heads) for t in parts)
        return x + self.out(merge_heads(attention(*heads, mask=mask)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, other_dim={self.other_dim}, num_heads={self.num_heads}"
