"""Learned tokens beside those of a frozen vision transformer: queries of features, and classes."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.nn.attention.heads import check_tokens
from weft.nn.attention.vit_blocks import block_heads, block_result, check_blocks
from weft.nn.checks import check_labels, check_sizes
from weft.ops.attention.attention import attention


class VisualQueryTuning(nn.Module):
    r"""Learned queries that summarize what each layer of a frozen vision transformer knows.

    .. math::
        Z_{l+1} = \text{block}_l(Z_l), \qquad
        S_l = \text{block}_l^{Q}(P_l \mid Z_l), \qquad
        \text{attention of } P_l: \;
        \mathrm{softmax}\big(\text{LN}(P_l) W_Q \, (\text{LN}(Z_l) W_K)^\top / \sqrt d\big)
        \, \text{LN}(Z_l) W_V

    The learned tokens of a layer are queries alone, never keys or values, and pass the rest of the
    block (projection, residual, MLP) with its weights. So the tokens of the image stay what they
    are without them, and of all gradients only those of the summaries exist: the image's tokens
    are computed without a graph. The head is trained on the class token of the last layer and the
    summaries of all layers, ``torch.cat([tokens[:, 0], summaries.flatten(1)], 1)``.

    Args:
        dim: C, the width of the transformer.
        num_layers: L, its blocks.
        num_queries: T, learned tokens of each layer.
        patch_size: of the transformer; the tokens are drawn uniformly within
            :math:`\pm\sqrt{6 / (3 \, \text{patch}^2 + C)}`.
        dropout: of the learned tokens, in training.
        device, dtype: of the parameters.

    Attributes:
        queries: ``(L, T, C)``, all there is to train.

    Shapes: tokens ``(B, N, C)`` and the L frozen blocks, which have the parts of timm's (``norm1``,
    ``attn.qkv``, ``attn.proj``, ``norm2``, ``mlp``, also with ``ls1`` or ``q_norm``), give tokens
    ``(B, N, C)`` behind the last block and summaries ``(B, L, T, C)``.

    Raises:
        ValueError: sizes, tokens of another shape, blocks of another number or kind.
        TypeError: tokens that are not floating-point.

    Source: Tu et al., "Visual Query Tuning: Towards Effective Usage of Intermediate Representations
    for Parameter and Memory Efficient Transfer Learning", CVPR 2023, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_queries: int = 1,
        *,
        patch_size: int = 16,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(dim=dim, num_layers=num_layers, num_queries=num_queries, patch_size=patch_size)
        _check_dropout(dropout)
        self.dim, self.dropout = dim, float(dropout)
        shape = (num_layers, num_queries, dim)
        self.queries = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        _draw_prompts(self.queries, patch_size)

    def forward(self, tokens: Tensor, blocks: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
        check_tokens("tokens", tokens, self.dim)
        check_blocks(blocks, len(self.queries))
        summaries = []
        for learned, block in zip(self.queries, blocks, strict=True):
            with torch.no_grad():
                query, key, value = block_heads(block, tokens)
                after = block_result(block, tokens, attention(query, key, value))
            learned = F.dropout(learned, self.dropout, self.training)[None]
            asked = block_heads(block, learned)[0].expand(len(tokens), -1, -1, -1)
            learned = learned.expand(len(tokens), -1, -1)
            summaries.append(block_result(block, learned, attention(asked, key, value)))
            tokens = after
        return tokens, torch.stack(summaries, 1)

    def extra_repr(self) -> str:
        L, T, C = self.queries.shape
        return f"dim={C}, num_layers={L}, num_queries={T}, dropout={self.dropout}"


class PromptCAM(nn.Module):
    r"""Class prompts in a frozen vision transformer: one learned token says what its class sees.

    .. math::
        Z_{l+1} = \text{block}_l([P_l, Z_l])_{\text{tokens}}, \qquad
        z^c = \text{LN}\big(\text{block}_L([P_L, Z_L])_c\big), \qquad
        s_c = \langle w, z^c \rangle + b

    with the same w and b for every class, so a class scores high only by what its own prompt takes
    from the image; the attention of each head of the last block from the prompt of the true class
    to the patches shows the traits by which the class is told apart (:meth:`explain`).

    What the prompts of a block give is dropped, but for the last: so there the prompts alone are
    queries, and everywhere else the image's tokens alone. Of the attention of the last block only
    the rows of the classes that are asked for are ever formed.

    Args:
        dim: C, the width of the transformer.
        num_classes: K.
        num_layers: number of its last blocks that get prompts.
        patch_size: of the transformer, as in :class:`VisualQueryTuning`.
        dropout: of the prompts, in training.
        device, dtype: of the parameters.

    Attributes:
        prompts: ``(num_layers, K, C)``, those of the last block are the classes'.
        head: w and b.

    Shapes: tokens ``(B, N, C)`` in front of those blocks, the blocks (as in
    :class:`VisualQueryTuning`) and the LayerNorm behind them give scores ``(B, K)``.

    Raises:
        ValueError: sizes, tokens of another shape, blocks of another number or kind, classes out
            of range.
        TypeError: tokens that are not floating-point, classes that are not int64.

    Source: Chowdhury et al., "Prompt-CAM: Making Vision Transformers Interpretable for Fine-Grained
    Analysis", CVPR 2025, section 3; the order of tokens and the bias are those of the authors'
    code.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_layers: int = 1,
        *,
        patch_size: int = 16,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(dim=dim, num_classes=num_classes, num_layers=num_layers, patch_size=patch_size)
        _check_dropout(dropout)
        self.dim, self.num_classes, self.dropout = dim, num_classes, float(dropout)
        factory = {"device": device, "dtype": dtype}
        self.prompts = nn.Parameter(torch.empty(num_layers, num_classes, dim, **factory))
        self.head = nn.Linear(dim, 1, **factory)
        _draw_prompts(self.prompts, patch_size)

    def forward(self, tokens: Tensor, blocks: Sequence[nn.Module], norm: nn.Module) -> Tensor:
        return self._run(tokens, blocks, norm)[0]

    def explain(
        self,
        tokens: Tensor,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        classes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores ``(B, K)``, and for a class of each image the attention that its prompt pays to
        the image's tokens in each head, ``(B, H, N)``, in float32 or wider.

        ``classes`` is ``(B,)`` int64; None takes the class of the highest score. The rest of the
        attention, up to 1, is paid to prompts.
        """
        scores, query, key, value = self._run(tokens, blocks, norm)
        if classes is None:
            classes = scores.argmax(1)
        check_labels("classes", classes, scores.shape[:1], self.num_classes)
        row = classes[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3])
        asked = query.gather(2, row)
        _, paid = attention(asked, key, value, return_key_sums=True)
        return scores, paid[..., self.num_classes :]

    def _run(self, tokens: Tensor, blocks: Sequence[nn.Module], norm: nn.Module):
        check_tokens("tokens", tokens, self.dim)
        check_blocks(blocks, len(self.prompts))
        K = self.num_classes
        for n, (prompts, block) in enumerate(zip(self.prompts, blocks, strict=True)):
            prompts = F.dropout(prompts, self.dropout, self.training)
            prompts = prompts.expand(len(tokens), -1, -1)
            query, key, value = block_heads(block, torch.cat([prompts, tokens], 1))
            if n + 1 < len(self.prompts):
                tokens = block_result(block, tokens, attention(query[:, :, K:], key, value))
        query = query[:, :, :K]
        seen = norm(block_result(block, prompts, attention(query, key, value)))
        return self.head(seen).squeeze(-1), query, key, value

    def extra_repr(self) -> str:
        L, K, C = self.prompts.shape
        return f"dim={C}, num_classes={K}, num_layers={L}, dropout={self.dropout}"


@torch.no_grad()
def _draw_prompts(prompts: Tensor, patch_size: int) -> None:
    """As a linear layer of patches of 3 channels by Xavier's rule."""
    bound = math.sqrt(6 / (3 * patch_size**2 + prompts.shape[-1]))
    prompts.uniform_(-bound, bound)


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
