"""timm's attention modules on weft, as subclasses that :func:`weft.patch` turns them into."""

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer_relpos
from torch import Tensor

from weft.integrations.common import attend, cosine_window_attention, table_window_attention


def _projected(self: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, N, head_dim), by one projection or three."""
    if getattr(self, "qkv", None) is None:
        each = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    else:
        each = _with_bias(self, x).chunk(3, -1)
    heads = self.num_heads, *(getattr(self, "num_kv_heads", self.num_heads),) * 2
    return tuple(t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in zip(each, heads, strict=True))


def _with_bias(self: torch.nn.Module, x: Tensor) -> Tensor:
    """BEiT and its descendants have no bias of the keys, so theirs is not in the projection."""
    if getattr(self, "q_bias", None) is None:
        return self.qkv(x)
    bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
    if self.qkv_bias_separate:
        return self.qkv(x) + bias
    return F.linear(x, self.qkv.weight, bias)


def _rotated(self: torch.nn.Module, x: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
    prefix, rest = x.tensor_split((self.num_prefix_tokens,), 2)
    half = getattr(self, "rotate_half", False)
    return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=half)], 2).to(dtype)


def _self_attention(
    self: torch.nn.Module,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    q, k, v = _projected(self, x)
    q, k = self.q_norm(q), self.k_norm(k)
    if rope is not None:
        q, k = _rotated(self, q, rope, v.dtype), _rotated(self, k, rope, v.dtype)
    out = attend(q, k, v, attn_mask, is_causal=is_causal, dropout_p=_dropout(self))
    out = self.norm(out.transpose(1, 2).flatten(2))
    if self.gate is not None:
        out = out * self.gate(x).sigmoid()
    return self.proj_drop(self.proj(out))


def _dropout(self: torch.nn.Module) -> float:
    return self.attn_drop.p if self.training else 0.0


class WeftAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return _self_attention(self, x, None, attn_mask, is_causal)


class WeftAttentionRope(AttentionRope):
    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        return _self_attention(self, x, rope, attn_mask, is_causal)


class WeftEvaAttention(eva.EvaAttention):
    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        return _self_attention(self, x, rope, attn_mask, is_causal)


class WeftBeitAttention(beit.Attention):
    def forward(self, x, shared_rel_pos_bias=None):
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        out = attend(*_projected(self, x), bias=bias, dropout_p=_dropout(self))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class WeftRelPosAttention(vision_transformer_relpos.RelPosAttention):
    def forward(self, x, shared_rel_pos=None):
        q, k, v = _projected(self, x)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out = attend(self.q_norm(q), self.k_norm(k), v, bias=bias, dropout_p=_dropout(self))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class WeftWindowAttention(swin_transformer.WindowAttention):
    def forward(self, x, mask=None):
        out = table_window_attention(
            *_projected(self, x),
            self.relative_position_bias_table,
            self.relative_position_index,
            mask,
            dropout_p=_dropout(self),
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class WeftWindowAttentionV2(swin_transformer_v2.WindowAttention):
    def forward(self, x, mask=None):
        out = cosine_window_attention(
            *_projected(self, x),
            self.logit_scale,
            self.cpb_mlp(self.relative_coords_table),
            self.relative_position_index,
            mask,
            dropout_p=_dropout(self),
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


REPLACEMENTS = {
    Attention: WeftAttention,
    AttentionRope: WeftAttentionRope,
    eva.EvaAttention: WeftEvaAttention,
    beit.Attention: WeftBeitAttention,
    vision_transformer_relpos.RelPosAttention: WeftRelPosAttention,
    swin_transformer.WindowAttention: WeftWindowAttention,
    swin_transformer_v2.WindowAttention: WeftWindowAttentionV2,
}
