"""Attention among fields and variates against the formulas, in float64."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import InteractingLayer, InvertedBlock, InvertedForecaster
from weft.ops.cases import randn

B, M, D, H = 2, 5, 6, 2


def tensor(*shape, seed=0):
    return randn(*shape, dtype=torch.float64, seed=seed).requires_grad_()


def check_gradients(out, truth, inputs):
    torch.testing.assert_close(out, truth)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", [True, False])
def test_interacting_layer_is_the_papers(residual):
    torch.manual_seed(0)
    layer = InteractingLayer(D, 8, H, residual=residual, dtype=torch.float64)
    x = tensor(B, M, D)
    q, k, v, *rest = layer.weights.weight.split(8)
    rows = []
    for e in x:
        for m in range(M):
            parts = []
            for h in range(H):
                own = slice(4 * h, 4 * h + 4)
                scores = torch.stack([(q[own] @ e[m]) @ (k[own] @ e[n]) for n in range(M)])
                weights = scores.exp() / scores.exp().sum()
                parts.append(sum(weights[n] * (v[own] @ e[n]) for n in range(M)))
            new = torch.cat(parts)
            rows.append(torch.relu(new + rest[0] @ e[m] if residual else new))
    truth = torch.stack(rows).view(B, M, 8)
    check_gradients(layer(x), truth, [x, layer.weights.weight])


def test_absent_fields():
    torch.manual_seed(0)
    layer = InteractingLayer(D, 8, H, dtype=torch.float64)
    x = tensor(B, M, D)
    mask = (torch.arange(M) < 3)[None, None, None]
    torch.testing.assert_close(layer(x, mask=mask)[:, :3], layer(x[:, :3]))


def encoder_layer(block):
    """PyTorch's post-norm layer with the block's weights."""
    dim = block.dim
    peer = torch.nn.TransformerEncoderLayer(
        dim, H, block.fc1.out_features, 0.0, F.gelu, batch_first=True, dtype=torch.float64
    )
    state = {
        "self_attn.in_proj_weight": block.qkv.weight,
        "self_attn.in_proj_bias": block.qkv.bias,
        "self_attn.out_proj.weight": block.proj.weight,
        "self_attn.out_proj.bias": block.proj.bias,
    }
    names = {"linear1": "fc1", "linear2": "fc2", "norm1": "norm1", "norm2": "norm2"}
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = getattr(getattr(block, ours), kind)
    peer.load_state_dict({name: value.detach() for name, value in state.items()})
    return peer.requires_grad_(False)


def test_inverted_block_is_a_post_norm_layer():
    torch.manual_seed(0)
    block = InvertedBlock(8, H, 12, dropout=0.0, dtype=torch.float64)
    x = tensor(B, M, 8)
    check_gradients(block(x), encoder_layer(block)(x), [x])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("covariates", [0, 2])
def test_forecaster_is_the_published_one(normalize, covariates):
    torch.manual_seed(0)
    net = InvertedForecaster(7, 3, 8, 2, H, dropout=0.0, normalize=normalize, dtype=torch.float64)
    series, more = tensor(B, 7, M), tensor(B, 7, covariates, seed=1)
    out = net(series, more if covariates else None)
    mean, deviation = torch.zeros(B, 1, M).double(), torch.ones(B, 1, M).double()
    if normalize:
        mean = series.detach().sum(1, keepdim=True) / 7
        centered = series - mean  # a constant; the variance has a mean of its own, with gradient
        deviation = (
            (centered - centered.sum(1, keepdim=True) / 7).square().sum(1, keepdim=True) / 7 + 1e-5
        ).sqrt()
    x = torch.cat([(series - mean) / deviation, more], 2).transpose(1, 2)
    x = x @ net.embedding.weight.mT + net.embedding.bias
    for block in net.blocks:
        x = encoder_layer(block)(x)
    x = net.projector(net.norm(x))[:, :M].transpose(1, 2)
    check_gradients(out, x * deviation + mean, [series])


def test_variates_are_a_set():
    torch.manual_seed(0)
    net = InvertedForecaster(7, 3, 8, 1, H, dtype=torch.float64).eval()
    series, order = tensor(B, 7, M), torch.tensor([2, 0, 4, 1, 3])
    torch.testing.assert_close(net(series[..., order]), net(series)[..., order])
    scaled = 3 * series + 10
    torch.testing.assert_close(net(scaled), 3 * net(series) + 10, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "match, make",
    [
        ("multiple of num_heads", lambda: InteractingLayer(D, 7, H)),
        ("x must", lambda: InteractingLayer(D, 8, H)(torch.ones(B, M, D + 1))),
        ("dropout", lambda: InvertedBlock(8, H, dropout=1.0)),
        ("hidden", lambda: InvertedBlock(8, H, 0)),
        ("future", lambda: InvertedForecaster(7, 0)),
        ("series", lambda: InvertedForecaster(7, 3, 8, 1, H)(torch.ones(B, 6, M))),
        (
            "covariates",
            lambda: InvertedForecaster(7, 3, 8, 1, H)(torch.ones(B, 7, M), torch.ones(1, 7, M)),
        ),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
