"""Multi-head attention with the arguments and parameters of ``torch.nn.MultiheadAttention``."""

from functools import reduce
from operator import add, and_

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.masks import Causal, Dense, Mask
from weft.nn.checks import check_features
from weft.ops.attention.attention import attention


class MultiheadAttention(nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention`` on :func:`weft.attention`.

    .. math::
        \text{head}_h = \mathrm{softmax}\left(\frac{Q_h K_h^\top}{\sqrt{d}} + B_h\right) V_h,
        \qquad Q = xW^Q + b^Q, \dots, \qquad y = [\text{head}_1, \dots, \text{head}_H] W^O + b^O

    The constructor's arguments, the ``state_dict`` and the arguments of ``forward`` are those of
    torch's module, and so are the results, with these differences:

    - a query that sees no key gets the bias of ``out_proj``, and weights of zero, where torch's
      module gives NaN;
    - ``is_causal=True`` alone masks causally, and the ``attn_mask`` beside it is not looked at;
    - an extra key of ``add_bias_kv`` is seen under ``is_causal``, with and without weights;
    - the weights that are returned are those before dropout;
    - wrong arguments raise ValueError or TypeError.

    ``need_weights=True``, which is torch's default, costs a second pass that stores all (L, S)
    pairs; the output itself never does. Inside ``torch.nn.TransformerEncoderLayer`` this module
    runs in inference too, where that layer would go past torch's own. Nested tensors are not
    supported: give ``torch.nn.TransformerEncoder`` a layer that already has this module,
    ``enable_nested_tensor=False``, or use :func:`weft.patch`.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype: as in torch's module.

    Shapes: query ``(L, N, E)``, key ``(S, N, kdim)``, value ``(S, N, vdim)``, with the batch
    first if ``batch_first``, or without N. ``key_padding_mask`` ``(N, S)`` and ``attn_mask``
    ``(L, S)`` or ``(N * num_heads, L, S)``: bool, where True hides a key, or floats that are added
    to the scores. ``attn_mask`` may also be a :class:`weft.masks.Mask`, where True shows a key.
    ``bias``: floats added to the scores, broadcastable to ``(N, num_heads, L, S)``, with gradient.
    Output as the query; weights ``(N, L, S)``, or ``(N, num_heads, L, S)`` without
    ``average_attn_weights``.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.2.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # What torch.nn.TransformerEncoderLayer asks before it takes the weights past forward().
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | Mask | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        self._check_inputs(query, key, value)
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        shape = (*q.shape[:3], k.shape[2])
        attn_mask = Causal() if is_causal else attn_mask
        mask, bias = _mask_and_bias(shape, q.dtype, attn_mask, key_padding_mask, bias)
        if self.bias_k is not None:
            # In front of the others: a causal rule then needs no more than another offset.
            k, v = (
                torch.cat([extra.view(1, self.num_heads, 1, -1).expand(len(x), -1, -1, -1), x], 2)
                for extra, x in ((self.bias_k, k), (self.bias_v, v))
            )
            mask, bias = _with_a_key_in_front(shape, mask, bias, q.device)
        # A key of zeros with a value of zeros: a sink whose logit is zero.
        sink = q.new_zeros(self.num_heads) if self.add_zero_attn else None
        dropout_p = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask=mask, bias=bias, sink=sink, dropout_p=dropout_p)
        out = out.transpose(1, 2).flatten(2)
        weights = self._weights(q, k, mask, bias, average_attn_weights) if need_weights else None
        if query.dim() == 2:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, size), x in zip(sizes.items(), (query, key, value), strict=True):
            check_features(name, x, size)
            if x.is_nested:
                raise TypeError(f"{name} must not be a nested tensor: pass key_padding_mask")
            if x.dim() != query.dim() or x.dim() not in (2, 3):
                raise ValueError(
                    "query, key and value must have 3 dimensions, or 2 without a batch, "
                    f"got {name} {tuple(x.shape)} beside query {tuple(query.shape)}"
                )
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (
            query.dim() == 3 and key.shape[batch] != query.shape[batch]
        ):
            raise ValueError(
                "key and value must have the same length, and the batch of the query, got "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(*each) for each in zip(inputs, weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """(N, heads, length, head_dim) of what was projected."""
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _weights(
        self, q: Tensor, k: Tensor, mask: Mask | None, bias: Tensor | None, average: bool
    ) -> Tensor:
        scores = (q * self.head_dim**-0.5) @ k.mT
        if bias is not None:
            scores = scores + bias
        hidden = scores <= torch.finfo(scores.dtype).min / 2
        if mask is not None:
            hidden = hidden | ~mask.to_dense(scores.shape, scores.device)
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.add_zero_attn:
            scores, hidden = F.pad(scores, (0, 1)), F.pad(hidden, (0, 1))
        blind = hidden.all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        if self.bias_k is not None:  # behind the keys, as torch's module has it
            S = k.shape[2]
            weights = torch.cat([weights[..., 1:S], weights[..., :1], weights[..., S:]], -1)
        return weights.mean(1) if average else weights


def _mask_and_bias(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    attn_mask: Tensor | Mask | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
) -> tuple[Mask | None, Tensor | None]:
    """Masks joined, floats added: what is bool goes to the one, what is not to the other."""
    N, H, L, S = shape
    masks, added = [], []
    if isinstance(attn_mask, Mask):
        masks.append(attn_mask)
    elif attn_mask is not None:
        if tuple(attn_mask.shape) not in ((L, S), (N * H, L, S)):
            raise ValueError(
                f"attn_mask must be {(L, S)} or {(N * H, L, S)}, got {tuple(attn_mask.shape)}"
            )
        each = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (N, H))
        _sort("attn_mask", each, masks, added)
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) not in [(N, S)] + [(S,)] * (N == 1):
            raise ValueError(
                f"key_padding_mask must be {(N, S)}, or {(S,)} without a batch, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        _sort("key_padding_mask", key_padding_mask.view(N, 1, 1, S), masks, added)
    if bias is not None:
        check_features("bias", bias)
        added.append(bias)
    mask = reduce(and_, masks) if masks else None
    return mask, reduce(add, (each.to(dtype) for each in added)) if added else None


def _sort(name: str, mask: Tensor, masks: list[Mask], added: list[Tensor]) -> None:
    if mask.dtype == torch.bool:
        masks.append(Dense(~mask))
    elif mask.is_floating_point() and _hides_alone(mask):
        masks.append(Dense(mask == 0))
    elif mask.is_floating_point():
        added.append(mask)
    else:
        raise TypeError(f"{name} must be bool or floating-point, got {mask.dtype}")


def _hides_alone(floats: Tensor) -> bool:
    """0 and -inf alone: torch.nn.TransformerEncoderLayer makes such floats of every bool mask. Not
    asked on a GPU, where the answer would have to be waited for."""
    if floats.requires_grad or floats.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(((floats == 0) | (floats == -torch.inf)).all())


def _with_a_key_in_front(
    shape: tuple[int, ...], mask: Mask | None, bias: Tensor | None, device: torch.device
) -> tuple[Mask | None, Tensor | None]:
    """One more key that all queries see, and to which nothing is added."""
    if isinstance(mask, Causal):
        mask = Causal(mask.offset + 1)
    elif mask is not None:
        mask = Dense(F.pad(mask.to_dense(shape, device), (1, 0), value=True))
    if bias is not None:
        bias = F.pad(bias.expand(*bias.shape[:-1], shape[3]), (1, 0))
    return mask, bias
