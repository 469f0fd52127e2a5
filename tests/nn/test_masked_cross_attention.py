"""Cross-attention inside masks against transformers' decoder layer, and PEM's by loops."""

import pytest
import torch
from peers import import_transformers
from torch.nn import functional as F

from weft.nn import MaskedCrossAttention, PrototypeCrossAttention, masks_from_logits
from weft.ops.cases import randn

B, Q, C, H, SIZE = 2, 5, 16, 4, (6, 7)
N = SIZE[0] * SIZE[1]


def tensor(*shape, seed=0):
    return randn(*shape, dtype=torch.float64, seed=seed)


def segments(seed=3):
    """Mask logits of another size; queries 1 and 4 of sample 0 have an empty mask."""
    logits = tensor(B, Q, 3, 4, seed=seed)
    logits[0, [1, 4]] = -1.0
    return logits


def test_decoder_layer_of_transformers():
    import_transformers()
    from transformers.models.mask2former import modeling_mask2former as peer

    torch.manual_seed(0)
    config = peer.Mask2FormerConfig(
        hidden_dim=C, num_attention_heads=H, dim_feedforward=8, dropout=0.0, pre_norm=False
    )
    decoder = peer.Mask2FormerMaskedAttentionDecoderLayer(config).double().eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = MaskedCrossAttention(C, H, dtype=torch.float64)
    state = decoder.cross_attn.state_dict()
    state |= {f"norm.{k}": v for k, v in decoder.cross_attn_layer_norm.state_dict().items()}
    ours.load_state_dict(state)
    query, memory = tensor(B, Q, C).requires_grad_(), tensor(B, N, C, seed=1).requires_grad_()
    at, to = tensor(1, Q, C, seed=4), tensor(1, N, C, seed=5)
    # as its mask predictor and its decoder make masks of logits
    resized = F.interpolate(segments(), size=SIZE, mode="bilinear", align_corners=False)
    hidden = (resized.sigmoid().flatten(2)[:, None].repeat(1, H, 1, 1) < 0.5).flatten(0, 1)
    assert hidden.all(-1).any()
    hidden[torch.where(hidden.sum(-1) == N)] = False
    caught = []
    decoder.cross_attn_layer_norm.register_forward_hook(lambda m, i, o: caught.append(o))
    decoder(
        query.transpose(0, 1),
        level_index=0,
        position_embeddings=[to.transpose(0, 1)],
        query_position_embeddings=at.transpose(0, 1),
        encoder_hidden_states=[memory.transpose(0, 1)],
        encoder_attention_mask=hidden,
    )
    truth = caught[0].transpose(0, 1)
    mask = masks_from_logits(segments(), SIZE)
    out = ours(query, memory, mask, query_position=at, memory_position=to)
    torch.testing.assert_close(out, truth)
    upstream = tensor(B, Q, C, seed=6)
    for a, b in zip(
        torch.autograd.grad(out, (query, memory), upstream),
        torch.autograd.grad(truth, (query, memory), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_masks_are_those_of_transformers():
    import_transformers()
    from transformers.models.mask2former import modeling_mask2former as peer

    torch.manual_seed(0)
    predictor = peer.Mask2FormerMaskPredictor(C, H, torch.tensor(C)).double()
    outputs, pixels = tensor(Q, B, C), tensor(B, C, 5, 9, seed=1)
    logits, hidden = predictor(outputs, pixels, SIZE)
    seen = ~hidden.view(B, H, Q, N)
    ours = masks_from_logits(logits, SIZE)
    empty = ~seen.any(-1, keepdim=True)
    assert torch.equal(ours[:, None].expand(-1, H, -1, -1), seen | empty)


def test_empty_masks_see_everything():
    torch.manual_seed(0)
    layer = MaskedCrossAttention(C, H, dtype=torch.float64)
    query, memory = tensor(B, Q, C), tensor(B, N, C, seed=1)
    mask = torch.zeros(B, Q, N, dtype=torch.bool)
    mask[:, 0, 3] = True
    out = layer(query, memory, mask)
    torch.testing.assert_close(out[:, 1:], layer(query, memory)[:, 1:])
    v = F.linear(memory[:, 3], *(p.chunk(3)[2] for p in (layer.in_proj_weight, layer.in_proj_bias)))
    torch.testing.assert_close(out[:, 0], layer.norm(query[:, 0] + layer.out_proj(v)))
    by_head = mask[:, None].expand(B, H, Q, N)
    assert torch.equal(layer(query, memory, by_head), out)
    assert masks_from_logits(segments(), SIZE)[0, 1].all()


def published_pem(layer, query, memory, mask, at, to):
    """One query, head and pixel at a time."""
    local = layer.feature_proj
    pixels = local.bn(memory + to)
    pixels = F.conv2d(pixels, local.to_query_3x3.weight, local.to_query_3x3.bias, 1, 1, groups=C)
    pixels = local.out(pixels.flatten(2).transpose(1, 2))
    pixels = pixels / pixels.norm(dim=-1, keepdim=True)
    norm, linear = layer.query_proj
    q = linear(norm(query + at))
    q = q / q.norm(dim=-1, keepdim=True)
    prototypes = []
    for b in range(B):
        for n in range(Q):
            for part in torch.arange(C).chunk(H):
                inside = [i for i in range(N) if mask[b, n, i]] or range(N)
                best = max(inside, key=lambda i: (pixels[b, i, part] @ q[b, n, part]).item())
                prototypes.append(pixels[b, best, part])
    prototypes = torch.cat(prototypes).view(B, Q, C)
    change = layer.proj(prototypes * q)
    change = change / change.norm(dim=1, keepdim=True)
    return layer.final(change * layer.alpha + prototypes) + query


@pytest.mark.parametrize("training", [True, False])
def test_pem_is_the_published_one(training):
    torch.manual_seed(0)
    layer = PrototypeCrossAttention(C, H, dtype=torch.float64).train(training)
    torch.nn.init.normal_(layer.alpha)
    names = {name.split(".")[0] for name in layer.state_dict()}
    assert names == {"alpha", "feature_proj", "query_proj", "proj", "final"}
    query, memory = tensor(B, Q, C).requires_grad_(), tensor(B, C, *SIZE, seed=1).requires_grad_()
    at, to = tensor(1, Q, C, seed=4), tensor(1, C, *SIZE, seed=5)
    mask = masks_from_logits(segments(), SIZE)
    out = layer(query, memory, mask, query_position=at, memory_position=to)
    truth = published_pem(layer, query, memory, mask, at, to)
    torch.testing.assert_close(out, truth)
    inputs = [query, memory, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_pem_takes_one_pixel_of_the_mask():
    torch.manual_seed(0)
    layer = PrototypeCrossAttention(C, H, dtype=torch.float64).eval()
    query, memory = tensor(B, Q, C), tensor(B, C, *SIZE, seed=1)
    mask = torch.zeros(B, Q, N, dtype=torch.bool)
    mask[:, :, 11] = True
    with torch.no_grad():
        chosen = layer._prototypes(tensor(B, Q, C, seed=2), tensor(B, N, C, seed=3), mask)
    assert torch.equal(chosen, tensor(B, N, C, seed=3)[:, 11:12].expand(B, Q, C))
    assert torch.equal(layer(query, memory, ~mask & mask), layer(query, memory))


@pytest.mark.parametrize(
    "error, match, make",
    [
        (ValueError, "multiple", lambda: MaskedCrossAttention(10, 4)),
        (ValueError, "logits", lambda: masks_from_logits(torch.ones(2, 3, 4))),
        (TypeError, "logits", lambda: masks_from_logits(torch.ones(1, 2, 3, 4, dtype=torch.bool))),
        (ValueError, "query", lambda: attend(torch.ones(B, Q, 3), torch.ones(B, N, C))),
        (ValueError, "memory", lambda: attend(torch.ones(B, Q, C), torch.ones(1, N, C))),
        (ValueError, "mask", lambda: attend(*good(), torch.ones(B, Q, 3, dtype=torch.bool))),
        (TypeError, "mask", lambda: attend(*good(), torch.ones(B, Q, N))),
        (
            ValueError,
            "memory",
            lambda: PrototypeCrossAttention(C, H)(torch.ones(B, Q, C), torch.ones(B, N, C)),
        ),
        (
            TypeError,
            "mask",
            lambda: PrototypeCrossAttention(C, H)(
                torch.ones(B, Q, C), torch.ones(B, C, *SIZE), torch.ones(B, Q, N)
            ),
        ),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()


def good():
    return torch.ones(B, Q, C), torch.ones(B, N, C)


def attend(*inputs):
    return MaskedCrossAttention(C, H)(*inputs)
