"""Models of transformers with ``attn_implementation="weft"``, and patched, against their own."""

import copy
import importlib
import re

import pytest
import torch
from peers import import_transformers

import weft
from weft import integrations
from weft.masks import Causal, Composition, MaskPlan, Segments, Window

transformers = import_transformers()
integrations.register()

SMALL = dict(hidden_size=24, num_attention_heads=4, intermediate_size=32, num_hidden_layers=2)
TEXT = dict(**SMALL, vocab_size=50, max_position_embeddings=64)
IMAGES = dict(image_size=24, patch_size=4)
GQA = dict(**TEXT, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOWS = dict(embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=3, **IMAGES)
TOKENS = torch.randint(3, 50, (3, 11), generator=torch.Generator().manual_seed(0))
PADDED_RIGHT = (torch.arange(11) < torch.tensor([[11], [7], [2]])).long()
PADDED_LEFT = PADDED_RIGHT.flip(1)


def build(name: str, **options):
    """A random model in float64, whose biases and norms are not those of a fresh one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images() -> dict:
    return {"pixel_values": torch.randn(2, 3, 24, 24, dtype=torch.float64)}


def outcome(model, **inputs) -> dict[str, torch.Tensor]:
    """The last hidden state where tokens are real, and the gradient of every parameter."""
    model.zero_grad()
    out = model(**inputs).last_hidden_state
    if (mask := inputs.get("attention_mask")) is not None and mask.dim() == 2:
        out = out[mask.bool()]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **{name: g.clone() for name, g in gradients.items()}}


def assert_same(actual, expected, *, atol=1e-9):
    assert actual.keys() == expected.keys() and len(actual) > 1
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-8, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture
def calls(monkeypatch):
    """The masks that reach weft.attention, one for each call."""
    from weft.integrations import common

    masks = []
    attention = common.attention

    def counted(*args, **options):
        masks.append(options.get("mask"))
        return attention(*args, **options)

    monkeypatch.setattr(common, "attention", counted)
    return masks


@pytest.mark.parametrize(
    "name, options",
    [
        ("ViT", dict(**SMALL, **IMAGES)),
        ("Dinov2", dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=2, **IMAGES)),
        ("Swin", WINDOWS),
    ],
)
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_images(name, options, other, calls):
    model = build(name, **options)
    x = images()
    model.set_attn_implementation(other)
    expected = outcome(model, **x)
    assert not calls
    model.set_attn_implementation("weft")
    # eager softmax is in float32
    assert_same(outcome(model, **x), expected, atol=1e-9 if other == "sdpa" else 1e-5)
    assert len(calls) == (4 if name == "Swin" else 2)


@pytest.mark.parametrize("padding", [None, PADDED_RIGHT, PADDED_LEFT])
@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral", "GPT2"])
def test_text(name, padding, calls):
    options = {
        "Bert": TEXT,
        "Llama": GQA,
        "Mistral": {**GQA, "sliding_window": 4},
        "GPT2": dict(n_embd=24, n_head=4, n_layer=2, vocab_size=50, n_positions=64),
    }[name]
    model = build(name, **options)
    x = {"input_ids": TOKENS} | ({} if padding is None else {"attention_mask": padding})
    expected = outcome(model, **x)
    model.set_attn_implementation("weft")
    assert_same(outcome(model, **x), expected)
    assert len(calls) == 2
    if padding is None:
        rule = {"Bert": type(None), "Mistral": Window}.get(name, Causal)
    elif padding is PADDED_LEFT:
        rule = MaskPlan
    else:
        rule = weft.masks.Lengths if name == "Bert" else Composition
    assert all(type(mask) is rule for mask in calls)


def test_packed_sequences(calls):
    model = build("Mistral", **{**GQA, "sliding_window": 3})
    lengths = ((4, 7), (1, 10), (6, 5))
    places = torch.stack([torch.cat([torch.arange(n) for n in each]) for each in lengths])
    x = {"input_ids": TOKENS, "position_ids": places, "use_cache": False}
    expected = outcome(model, **x)
    model.set_attn_implementation("weft")
    assert_same(outcome(model, **x), expected)
    for mask in calls:
        assert {type(part) for part in mask.parts} == {Window, Segments}


def test_matrices_of_the_user(calls):
    """A bool mask of all pairs, and floats with the smallest number in place of −∞."""
    model = build("Llama", **GQA)
    see = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.5
    see |= torch.eye(11, dtype=torch.bool)
    lowest = torch.finfo(torch.float64).min
    for mask in (see, torch.zeros(see.shape, dtype=torch.float64).masked_fill(~see, lowest)):
        model.set_attn_implementation("sdpa")
        expected = outcome(model, input_ids=TOKENS, attention_mask=mask)
        model.set_attn_implementation("weft")
        assert_same(outcome(model, input_ids=TOKENS, attention_mask=mask), expected)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_generation(name, cache):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**GQA)
    if name == "Mistral":
        config.sliding_window = 6
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    options = dict(max_new_tokens=9, do_sample=False, cache_implementation=cache)
    options |= dict(return_dict_in_generate=True, output_logits=True, disable_compile=True)
    results = []
    for implementation in ("sdpa", "weft"):
        model.set_attn_implementation(implementation)
        result = model.generate(TOKENS, attention_mask=PADDED_LEFT, **options)
        results.append([result.sequences, torch.stack(result.logits)])
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-8, atol=1e-9)


def test_softcap_sinks_and_position_bias():
    """Arguments of the interface that sdpa does not take are compared with eager attention."""
    window = dict(sliding_window=4, head_dim=8)
    gemma = {**GQA, **window, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    oss = {**GQA, **window, "num_local_experts": 2, "num_experts_per_tok": 1}
    oss["experts_implementation"] = "eager"  # the other has no float64
    for name, options in (("Gemma2", gemma), ("GptOss", oss)):
        model = build(name, **options)
        model.set_attn_implementation("eager")
        expected = outcome(model, input_ids=TOKENS)
        model.set_attn_implementation("weft")
        assert_same(outcome(model, input_ids=TOKENS), expected, atol=1e-4)


def test_gradient_checkpoints():
    model = build("Mistral", **{**GQA, "sliding_window": 4}, attention_dropout=0.0)
    model.set_attn_implementation("weft")
    x = {"input_ids": TOKENS, "attention_mask": PADDED_LEFT, "use_cache": False}
    expected = outcome(model.train(), **x)
    model.gradient_checkpointing_enable()
    assert_same(outcome(model, **x), expected)


def test_dropout():
    model = build("ViT", **SMALL, **IMAGES, attention_probs_dropout_prob=0.5)
    model.set_attn_implementation("weft")
    x = images()
    with torch.no_grad():
        exact = model(**x).last_hidden_state
        model.train()
        torch.manual_seed(0)
        first = model(**x).last_hidden_state
        assert not torch.allclose(first, exact)
        torch.manual_seed(0)
        assert torch.equal(model(**x).last_hidden_state, first)


@pytest.mark.parametrize("name", ["Bert", "Mistral"])
def test_compiled(name):
    model = build(name, **{**(TEXT if name == "Bert" else GQA), "num_hidden_layers": 1})
    model.set_attn_implementation("weft")
    x = {"input_ids": TOKENS, "attention_mask": PADDED_RIGHT}
    expected = model(**x).last_hidden_state
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(**x, use_cache=False) if name != "Bert" else compiled(**x)
    seen = PADDED_RIGHT.bool()
    torch.testing.assert_close(actual.last_hidden_state[seen], expected[seen])


def cvt():
    small = dict(patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1], depth=[1, 2])
    lists = dict(mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0])
    lists |= dict(drop_path_rate=[0.0, 0.0], qkv_bias=[True, True], cls_token=[False, True])
    lists |= dict(qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3])
    lists |= dict(padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1])
    return build("Cvt", embed_dim=[8, 16], num_heads=[1, 2], num_stages=2, **small, **lists)


PATCHED = {
    "CvtSelfAttention": cvt,
    "DonutSwinSelfAttention": lambda: build("DonutSwin", **WINDOWS),
    "SwinAttention": lambda: build("Swin", **WINDOWS),
    "Swinv2SelfAttention": lambda: build("Swinv2", **WINDOWS),
}


@pytest.mark.parametrize("kind", PATCHED)
def test_patched(kind, calls, capsys):
    model = PATCHED[kind]()
    x = images()
    expected, names = outcome(model, **x), list(model.state_dict())
    assert weft.patch(model) is model
    assert re.search(rf"\b[34] {kind}\b", capsys.readouterr().out)
    assert_same(outcome(model, **x), expected)
    assert len(calls) == (3 if kind == "CvtSelfAttention" else 4)
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="known"):
        weft.patch(model)  # what is replaced is not replaced again
    if kind != "CvtSelfAttention":
        original = PATCHED[kind]()
        for each in (model, original):
            each.set_attn_implementation("eager")
        both = [m(**x, output_attentions=True).attentions for m in (model, original)]
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ClapAudioSelfAttention", "MaskFormerSwinSelfAttention"])
def test_patched_copies_of_swin(name, capsys):
    """Inside models that take more than an image; by themselves here."""
    package = {"C": "clap.modeling_clap", "M": "maskformer.modeling_maskformer_swin"}[name[0]]
    module = importlib.import_module(f"transformers.models.{package}")
    config = transformers.ClapAudioConfig(qkv_bias=True, attention_probs_dropout_prob=0.0)
    theirs = getattr(module, name)(config, 16, 2, 3).double()
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = weft.patch(copy.deepcopy(theirs))
    assert f"1 {name}" in capsys.readouterr().out
    x = torch.randn(8, 9, 16, dtype=torch.float64)
    labels = torch.randint(3, (4, 9))
    mask = -100.0 * (labels[:, :, None] != labels[:, None]).double()
    for shift in (None, mask):
        results = []
        for attention in (ours, theirs):
            (out,) = attention(x, shift)
            results.append([out, *torch.autograd.grad(out.sin().sum(), attention.parameters())])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_patched_and_compiled():
    model = weft.patch(build("Swinv2", **{**WINDOWS, "depths": [2], "num_heads": [2]}))
    x = images()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**x).last_hidden_state, model(**x).last_hidden_state)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_patched_mask2former(pre_norm, capsys):
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[2, 2, 2, 2],
            window_size=2,
            image_size=32,
            patch_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=4,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        dropout=0.0,
        pre_norm=pre_norm,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def outcome_of(m):
        m.zero_grad()
        out = m(pixel_values=x)
        (out.class_queries_logits.sin().sum() + out.masks_queries_logits.sin().mean()).backward()
        gradients = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
        found = {"classes": out.class_queries_logits, "masks": out.masks_queries_logits}
        return {**{n: t.detach() for n, t in found.items()}, **gradients}

    original = copy.deepcopy(model)
    expected = outcome_of(original)
    weft.patch(model)
    said = capsys.readouterr().out
    for part in ("3 MultiheadAttention", "3 Mask2FormerAttention", "4 SwinAttention"):
        assert part in said
    assert_same(outcome_of(model), expected)
    assert list(model.state_dict()) == list(original.state_dict())
    attentions = [m(pixel_values=x, output_attentions=True).attentions for m in (model, original)]
    for ours, theirs in zip(*attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_nothing_to_patch():
    with pytest.raises(ValueError, match="Linear"):
        weft.patch(torch.nn.Linear(2, 2))
