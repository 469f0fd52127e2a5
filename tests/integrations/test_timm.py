"""Models of timm after weft.patch against themselves before."""

import copy

import pytest
import torch
from peers import import_timm

import weft

timm = import_timm()

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
SWIN = dict(img_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 4), num_classes=5)


def vit(**options):
    return timm.models.vision_transformer.VisionTransformer(**VIT, **options)


MODELS = {
    "vit": (vit, "2 Attention"),
    "vit, norms and gate": (
        lambda: vit(qk_norm=True, scale_attn_norm=True, qkv_bias=False),
        "2 Attention",
    ),
    "eva": (
        lambda: timm.models.eva.Eva(**VIT, use_rot_pos_emb=True, qkv_fused=True),
        "2 EvaAttention",
    ),
    "eva, projections apart": (
        lambda: timm.models.eva.Eva(
            **VIT, use_rot_pos_emb=True, qkv_fused=False, scale_attn_inner=True
        ),
        "2 EvaAttention",
    ),
    "eva, rope": (
        lambda: timm.models.eva.Eva(**VIT, use_rot_pos_emb=True, attn_type="rope", qk_norm=True),
        "2 AttentionRope",
    ),
    "beit": (
        lambda: timm.models.beit.Beit(**VIT, use_rel_pos_bias=True, use_abs_pos_emb=False),
        "2 Attention",
    ),
    "beit, shared bias": (
        lambda: timm.models.beit.Beit(**VIT, use_shared_rel_pos_bias=True),
        "2 Attention",
    ),
    "relative positions": (
        lambda: timm.models.vision_transformer_relpos.VisionTransformerRelPos(
            **VIT, rel_pos_type="bias"
        ),
        "2 RelPosAttention",
    ),
    "swin": (
        lambda: timm.models.swin_transformer.SwinTransformer(**SWIN, window_size=4),
        "4 WindowAttention",
    ),
    "swin v2": (
        lambda: timm.models.swin_transformer_v2.SwinTransformerV2(**SWIN, window_size=4),
        "4 WindowAttention",
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, dtype=torch.float64):
    """Random parameters, also where timm begins with zeros."""
    torch.manual_seed(0)
    model = MODELS[name][0]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outcome(model, x):
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients}


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_patched(name, dtype, capsys):
    model = build(name, dtype)
    x = torch.randn(3, 3, 32, 32, dtype=dtype)
    expected, names = outcome(model, x), list(model.state_dict())
    assert weft.patch(model) is model
    assert MODELS[name][1] in capsys.readouterr().out
    actual = outcome(model, x)
    assert list(model.state_dict()) == names and actual.keys() == expected.keys()
    rounding = 1e-10 if dtype == torch.float64 else 2e-5
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():  # that of a key's bias is 0 but for the rounding of others
        scale = max(float(value.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(actual[key], value, rtol=0, atol=rounding * scale)


@pytest.mark.parametrize("name", ["vit", "beit", "swin", "swin v2"])
def test_autocast(name):
    """bfloat16 products move both models from the exact result, ours no further than twice."""
    model = build(name, torch.float32)
    x = torch.randn(2, 3, 32, 32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(x)
        ours = weft.patch(model)(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    error = [(out - exact).abs().max() for out in (ours, theirs)]
    assert error[0] <= 2 * error[1]
    ours.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["eva", "swin"])
def test_compiled(name):
    model = weft.patch(build(name))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_masks_of_attention():
    theirs = timm.layers.Attention(32, 4, qkv_bias=True).double()
    ours = weft.patch(copy.deepcopy(theirs))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    see = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    see |= torch.eye(7, dtype=torch.bool)
    for masks in (
        {"attn_mask": see},
        {"attn_mask": torch.randn(7, 7).double()},
        {"is_causal": True},
    ):
        torch.testing.assert_close(ours(x, **masks), theirs(x, **masks))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_dropout(name):
    model = build(name)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weft.patch(model)
    with torch.no_grad():
        exact = model(x)
        for module in model.modules():
            if hasattr(module, "attn_drop"):
                module.attn_drop.p = 0.5
        torch.testing.assert_close(model(x), exact, rtol=0, atol=0)
        model.train()
        torch.manual_seed(0)
        first = model(x)
        assert not torch.allclose(first, exact)
        torch.manual_seed(0)
        assert torch.equal(model(x), first)


def test_other_image_sizes():
    """Windows and masks that change after the patch."""
    model = build("swin")
    patched = weft.patch(copy.deepcopy(model))
    x = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    for each in (model, patched):
        each.set_input_size(img_size=(48, 48), window_size=(6, 6))
    torch.testing.assert_close(patched(x), model(x))
