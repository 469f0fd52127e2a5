"""Many more models of transformers with ``attn_implementation="weft"``: the forward pass."""

import pytest
import torch
from peers import import_transformers

from weft import integrations

transformers = import_transformers()
integrations.register()

LAYERS = dict(
    hidden_size=32, num_attention_heads=4, intermediate_size=32, num_hidden_layers=2, pad_token_id=0
)
TEXT = dict(**LAYERS, vocab_size=60, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
GQA = dict(**TEXT, num_key_value_heads=2)
HEADS = dict(**GQA, head_dim=8)
EXPERTS = dict(num_experts_per_tok=1, experts_implementation="eager")
BOTH = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
BOTH |= dict(decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60)
BOTH |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
IMAGE = dict(**LAYERS, image_size=16, patch_size=4)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
LATENT |= dict(n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=8)
SPEECH = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, conv_dim=[8, 8])
SPEECH |= dict(conv_kernel=[3, 3], conv_stride=[2, 2])

IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
REAL = torch.arange(10) < torch.tensor([[10], [6]])
TOKENS = {"input_ids": IDS, "attention_mask": REAL.long()}
TWO_TEXTS = {**TOKENS, "decoder_input_ids": IDS[:, :5]}


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


PIXELS = {"pixel_values": floats(2, 3, 16, 16)}
FRAMES = {"pixel_values": floats(2, 4, 3, 16, 16)}
MAP = {"pixel_values": floats(2, 3, 32, 32)}
SOUND = {"input_values": floats(2, 100)}
MEL = {"input_features": floats(2, 8, 40), "decoder_input_ids": IDS[:, :5]}

# name: arguments of the configuration, inputs, calls of attention
MODELS = {
    "Qwen2": (GQA, TOKENS, 2),
    "Qwen3": (HEADS, TOKENS, 2),
    "Gemma3Text": (dict(**HEADS, sliding_window=4), TOKENS, 2),
    "Llama4Text": (
        dict(
            **HEADS,
            **EXPERTS,
            attention_chunk_size=4,
            num_local_experts=1,
            intermediate_size_mlp=32,
        ),
        TOKENS,
        2,
    ),
    "Mixtral": (dict(**GQA, **EXPERTS, num_local_experts=2), TOKENS, 2),
    "DeepseekV3": (
        dict(**TEXT, **EXPERTS, **LATENT, num_key_value_heads=4, first_k_dense_replace=1),
        TOKENS,
        2,
    ),
    "Cohere": (GQA, TOKENS, 2),
    "Olmo2": (GQA, TOKENS, 2),
    "StableLm": (GQA, TOKENS, 2),
    "Starcoder2": (GQA, TOKENS, 2),
    "Doge": (dict(**GQA, num_experts=2), TOKENS, 2),
    "GPTNeoX": (TEXT, TOKENS, 2),
    "Phi": (TEXT, TOKENS, 2),
    "OPT": (dict(**TEXT, ffn_dim=32, word_embed_proj_dim=32), TOKENS, 2),
    "ModernBert": (
        dict(
            **TEXT,
            local_attention=4,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        TOKENS,
        2,
    ),
    "Roberta": (TEXT, TOKENS, 2),
    "XLMRoberta": (TEXT, TOKENS, 2),
    "Electra": (TEXT, TOKENS, 2),
    "Albert": (dict(**TEXT, embedding_size=16), TOKENS, 2),
    "DistilBert": (dict(dim=32, n_heads=4, n_layers=2, hidden_dim=32, vocab_size=60), TOKENS, 2),
    "CLIPText": (TEXT, TOKENS, 2),
    "T5": (
        dict(d_model=32, d_kv=8, num_heads=4, d_ff=32, num_layers=2, vocab_size=60),
        TWO_TEXTS,
        6,
    ),
    "Bart": (dict(**BOTH, max_position_embeddings=64), TWO_TEXTS, 6),
    "Whisper": (
        dict(**BOTH, num_mel_bins=8, max_source_positions=20, max_target_positions=20),
        MEL,
        6,
    ),
    "Wav2Vec2": (dict(**LAYERS, **SPEECH), SOUND, 2),
    "CLIPVision": (IMAGE, PIXELS, 2),
    "SiglipVision": (IMAGE, PIXELS, 2),
    "DINOv3ViT": (IMAGE, PIXELS, 2),
    "DeiT": (IMAGE, PIXELS, 2),
    "Beit": (dict(**IMAGE, use_relative_position_bias=True), PIXELS, 2),
    "VideoMAE": (dict(**IMAGE, num_frames=4), FRAMES, 2),
    "Segformer": (
        dict(hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_attention_heads=[1, 2, 2, 2]),
        MAP,
        4,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_as_before(name, monkeypatch):
    from weft.integrations import common

    options, inputs, expected_calls = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config).double().eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
    expected = model(**inputs).last_hidden_state
    calls = []
    attention = common.attention
    monkeypatch.setattr(common, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    model.set_attn_implementation("weft")
    actual = model(**inputs).last_hidden_state
    assert len(calls) == expected_calls
    real = REAL if expected.shape[:2] == REAL.shape else ...
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-9, atol=1e-9)
