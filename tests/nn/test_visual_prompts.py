"""Prompts in frozen blocks of timm, against those blocks run on all tokens as published."""

import pytest
import torch
from peers import import_timm
from torch import nn

from weft.nn import PromptCAM, VisualQueryTuning
from weft.ops.cases import randn

B, N, C, H, L, T, K = 2, 7, 12, 3, 3, 2, 5


@pytest.fixture(params=["plain", "norms and scales"])
def blocks(request):
    import_timm()
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    more = {} if request.param == "plain" else {"qk_norm": True, "init_values": 0.5}
    made = nn.ModuleList(Block(C, H, qkv_bias=True, **more).double() for _ in range(L)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def tokens():
    return randn(B, N, C, dtype=torch.float64)


def attended(block, queries, context):
    """What the block's attention gives for normalized queries, and its weights, by the matrix."""
    attn = block.attn
    heads = lambda x: x.unflatten(-1, (H, -1)).transpose(1, 2)  # noqa: E731
    q = attn.q_norm(heads(attn.qkv(queries)[..., :C]))
    k = attn.k_norm(heads(attn.qkv(context)[..., C : 2 * C]))
    v = heads(attn.qkv(context)[..., 2 * C :])
    p = (q @ k.mT / (C // H) ** 0.5).softmax(-1)
    return attn.proj((p @ v).transpose(1, 2).flatten(2)), p


def whole(block, x, context):
    y, p = attended(block, block.norm1(x), block.norm1(context))
    x = x + block.ls1(y)
    return x + block.ls2(block.mlp(block.norm2(x))), p


def test_query_tuning_is_the_published_one(blocks):
    torch.manual_seed(0)
    layer = VisualQueryTuning(C, L, T, dtype=torch.float64)
    nn.init.normal_(layer.queries)
    out, summaries = layer(tokens(), blocks)
    x, expected = tokens(), []
    for learned, block in zip(layer.queries, blocks, strict=True):
        joined, _ = whole(block, torch.cat([learned.expand(B, T, C), x], 1), x)
        expected.append(joined[:, :T])
        x = joined[:, T:]
    truth = torch.stack(expected, 1)
    torch.testing.assert_close(summaries, truth)
    torch.testing.assert_close(out, x)
    (ours,) = torch.autograd.grad(summaries.square().sum(), layer.queries)
    # published: gradients through the tokens of the image do not exist, they do not see prompts
    (grad,) = torch.autograd.grad(truth.square().sum(), layer.queries)
    torch.testing.assert_close(ours, grad)


def test_tokens_of_the_image_are_those_without_queries(blocks):
    layer = VisualQueryTuning(C, L, T, dtype=torch.float64)
    out, summaries = layer(tokens(), blocks)
    torch.testing.assert_close(out, nn.Sequential(*blocks)(tokens()))
    assert not out.requires_grad and summaries.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["queries"]


@pytest.mark.parametrize("layers", [1, L])
def test_prompt_cam_is_the_published_one(blocks, layers):
    torch.manual_seed(0)
    layer = PromptCAM(C, K, layers, dtype=torch.float64)
    nn.init.normal_(layer.prompts)
    norm = nn.LayerNorm(C, dtype=torch.float64)
    used = blocks[L - layers :]
    classes = torch.tensor([3, 0])
    scores, maps = layer.explain(tokens(), used, norm, classes)
    x = tokens()
    for prompts, block in zip(layer.prompts, used, strict=True):
        joined = torch.cat([prompts.expand(B, K, C), x[:, -N:]], 1)
        x, p = whole(block, joined, joined)
    truth = layer.head(norm(x)[:, :K])[..., 0]
    torch.testing.assert_close(scores, truth)
    torch.testing.assert_close(layer(tokens(), used, norm), truth)
    torch.testing.assert_close(maps, torch.stack([p[0, :, 3, K:], p[1, :, 0, K:]]))
    inputs = [layer.prompts, *layer.head.parameters(), *norm.parameters()]
    for a, b in zip(
        torch.autograd.grad(scores.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_explains_the_prediction(blocks):
    torch.manual_seed(0)
    layer, norm = PromptCAM(C, K, L, dtype=torch.float64), nn.LayerNorm(C, dtype=torch.float64)
    nn.init.normal_(layer.prompts)
    scores, maps = layer.explain(tokens(), blocks, norm)
    torch.testing.assert_close(
        maps, layer.explain(tokens(), blocks, norm, scores.argmax(1))[1], rtol=0, atol=0
    )
    assert ((maps > 0) & (maps < 1)).all() and (maps.sum(-1) < 1).all()


@pytest.mark.parametrize("blocks", ["plain"], indirect=True)
def test_compiles_and_half_precision(blocks):
    norm = nn.LayerNorm(C)
    blocks, x = blocks.float(), tokens().float()
    tuning, cam = VisualQueryTuning(C, L, T), PromptCAM(C, K, L)
    for run in (lambda x: tuning(x, blocks)[1], lambda x: cam.explain(x, blocks, norm)[1]):
        truth = run(x)
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), truth)
        compiled(x).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            half = run(x)
        scale = truth.abs().max().item()
        torch.testing.assert_close(half.float(), truth, rtol=0.05, atol=0.03 * scale)


@pytest.mark.parametrize(
    "error, match, make",
    [
        (ValueError, "num_queries", lambda: VisualQueryTuning(C, L, 0)),
        (ValueError, "dropout", lambda: PromptCAM(C, K, dropout=1.0)),
        (ValueError, "3 blocks", lambda: VisualQueryTuning(C, L)(torch.ones(B, N, C), [])),
        (
            ValueError,
            "has no norm1",
            lambda: PromptCAM(C, K)(torch.ones(B, N, C), [nn.Linear(C, C)], nn.Identity()),
        ),
        (ValueError, "tokens", lambda: VisualQueryTuning(C, L)(torch.ones(B, N, 3), [])),
        (
            TypeError,
            "tokens",
            lambda: VisualQueryTuning(C, L)(torch.ones(B, N, C, dtype=torch.int64), []),
        ),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_refuses_classes(blocks):
    layer, norm = PromptCAM(C, K, L, dtype=torch.float64), nn.Identity()
    for error, classes in ((ValueError, torch.tensor([0, K])), (TypeError, torch.tensor([0.0, 1]))):
        with pytest.raises(error, match="classes"):
            layer.explain(tokens(), blocks, norm, classes)
