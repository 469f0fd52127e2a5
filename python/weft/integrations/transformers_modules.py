"""Attention modules of transformers that compute past its interface, or would gain little from it:
subclasses that :func:`weft.patch` turns them into. Where attentions are asked for, they do what
their parents do."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clap.modeling_clap import ClapAudioSelfAttention
from transformers.models.cvt.modeling_cvt import CvtSelfAttention
from transformers.models.donut.modeling_donut_swin import DonutSwinSelfAttention
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerAttention,
    Mask2FormerMaskedAttentionDecoderLayer,
)
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinSelfAttention
from transformers.models.swin.modeling_swin import SwinAttention
from transformers.models.swinv2.modeling_swinv2 import Swinv2SelfAttention

from weft.integrations.common import attend, cosine_window_attention, table_window_attention
from weft.masks import Dense


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class WeftCvtSelfAttention(CvtSelfAttention):
    def forward(self, hidden_state, height, width):
        prefix = int(self.with_cls_token)
        cls_token, tokens = hidden_state.tensor_split((prefix,), 1)
        grid = tokens.transpose(1, 2).unflatten(2, (height, width))

        def projected(convolution: nn.Module, linear: nn.Module) -> Tensor:
            return _heads(linear(torch.cat((cls_token, convolution(grid)), 1)), self.num_heads)

        out = attend(
            projected(self.convolution_projection_query, self.projection_query),
            projected(self.convolution_projection_key, self.projection_key),
            projected(self.convolution_projection_value, self.projection_value),
            scale=self.scale,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return out.transpose(1, 2).flatten(2)


class WeftSwinAttention(SwinAttention):
    """The table and the regions, where the interface gets a matrix for every window."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if kwargs.get("output_attentions") or self.config.output_attentions:
            return super().forward(hidden_states, attention_mask, **kwargs)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        out = table_window_attention(
            *(_heads(project(hidden_states), self.num_attention_heads) for project in projections),
            self.relative_position_bias.relative_position_bias_table,
            self.relative_position_bias.relative_position_index,
            attention_mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class _SwinSelfAttention:
    """The forward of the models that hold copies of Swin as it was before the interface."""

    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        if output_attentions:
            return super().forward(hidden_states, attention_mask, output_attentions)
        projections = (self.query, self.key, self.value)
        out = table_window_attention(
            *(_heads(project(hidden_states), self.num_attention_heads) for project in projections),
            self.relative_position_bias_table,
            self.relative_position_index,
            attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return (out.transpose(1, 2).flatten(2),)


class WeftClapAudioSelfAttention(_SwinSelfAttention, ClapAudioSelfAttention):
    pass


class WeftDonutSwinSelfAttention(_SwinSelfAttention, DonutSwinSelfAttention):
    pass


class WeftMaskFormerSwinSelfAttention(_SwinSelfAttention, MaskFormerSwinSelfAttention):
    pass


class WeftSwinv2SelfAttention(Swinv2SelfAttention):
    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        if output_attentions:
            return super().forward(hidden_states, attention_mask, output_attentions)
        projections = (self.query, self.key, self.value)
        out = cosine_window_attention(
            *(_heads(project(hidden_states), self.num_attention_heads) for project in projections),
            self.logit_scale,
            self.continuous_position_bias_mlp(self.relative_coords_table),
            self.relative_position_index,
            attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return (out.transpose(1, 2).flatten(2),)


class WeftMask2FormerAttention(Mask2FormerAttention):
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        key_value_states=None,
        key_value_position_embeddings=None,
        output_attentions=False,
    ):
        if output_attentions or key_value_states is not None:
            return super().forward(
                hidden_states,
                attention_mask,
                position_embeddings,
                key_value_states,
                key_value_position_embeddings,
                output_attentions,
            )
        values = hidden_states.transpose(0, 1)
        places = self.with_pos_embed(hidden_states, position_embeddings).transpose(0, 1)
        mask = attention_mask
        if mask is not None:
            mask = mask.unflatten(0, (-1, self.num_heads))
        out = attend(
            _heads(self.q_proj(places), self.num_heads),
            _heads(self.k_proj(places), self.num_heads),
            _heads(self.v_proj(values), self.num_heads),
            mask,
            scale=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2)).transpose(0, 1), None


class WeftMask2FormerLayer(Mask2FormerMaskedAttentionDecoderLayer):
    """Asks for attentions only if they are asked of it, and gives one mask for all heads."""

    def forward(
        self,
        hidden_states,
        level_index=None,
        attention_mask=None,
        position_embeddings=None,
        query_position_embeddings=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=False,
    ):
        mask, memory = encoder_attention_mask, encoder_hidden_states[level_index]
        if mask is not None:  # True hides, (batch * heads, queries, keys), the same for all heads
            mask = Dense(~mask.unflatten(0, (-1, self.cross_attn.num_heads))[:, :1].bool())
        weights = ()

        def cross_attention(x: Tensor) -> Tensor:
            nonlocal weights
            out, given = self.cross_attn(
                self.with_pos_embed(x, query_position_embeddings),
                self.with_pos_embed(memory, position_embeddings[level_index]),
                memory,
                attn_mask=mask,
                need_weights=bool(output_attentions),
            )
            weights = (given,)
            return out

        def self_attention(x: Tensor) -> Tensor:
            nonlocal weights
            out, given = self.self_attn(
                x,
                position_embeddings=query_position_embeddings,
                output_attentions=output_attentions,
            )
            weights = (given, *weights)
            return out

        def mlp(x: Tensor) -> Tensor:
            inner = self.activation_fn(self.fc1(x))
            return self.fc2(F.dropout(inner, self.activation_dropout, self.training))

        x = self._residual(hidden_states, self.cross_attn_layer_norm, cross_attention)
        x = self._residual(x, self.self_attn_layer_norm, self_attention)
        x = self._residual(x, self.final_layer_norm, mlp)
        return (x, *weights) if output_attentions else (x,)

    def _residual(self, x: Tensor, norm: nn.Module, branch) -> Tensor:
        out = branch(norm(x) if self.pre_norm else x)
        x = x + F.dropout(out, self.dropout, self.training)
        return x if self.pre_norm else norm(x)


REPLACEMENTS = {
    ClapAudioSelfAttention: WeftClapAudioSelfAttention,
    CvtSelfAttention: WeftCvtSelfAttention,
    DonutSwinSelfAttention: WeftDonutSwinSelfAttention,
    Mask2FormerAttention: WeftMask2FormerAttention,
    Mask2FormerMaskedAttentionDecoderLayer: WeftMask2FormerLayer,
    MaskFormerSwinSelfAttention: WeftMaskFormerSwinSelfAttention,
    SwinAttention: WeftSwinAttention,
    Swinv2SelfAttention: WeftSwinv2SelfAttention,
}
