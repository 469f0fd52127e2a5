"""A stage of FIT against PyTorch's layers, group by group, in float64."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import FITBlock
from weft.ops.cases import randn

B, T, N, M, D, E, H = 2, 3, 5, 2, 8, 6, 2


def tensor(*shape, seed=0):
    return randn(*shape, dtype=torch.float64, seed=seed).requires_grad_()


def encoder(layer, x, hidden=None):
    """PyTorch's pre-norm layer with the same weights."""
    dim = x.shape[-1]
    peer = torch.nn.TransformerEncoderLayer(
        dim, H, 4 * dim, 0.0, F.gelu, 1e-6, True, norm_first=True, dtype=torch.float64
    )
    names = {
        "self_attn.in_proj": layer.qkv,
        "self_attn.out_proj": layer.proj,
        "linear1": layer.mlp.fc1,
        "linear2": layer.mlp.fc2,
        "norm1": layer.norm1,
        "norm2": layer.norm2,
    }
    state = {}
    for name, part in names.items():
        joint = "_" if name.endswith("in_proj") else "."
        state |= {f"{name}{joint}{kind}": getattr(part, kind) for kind in ("weight", "bias")}
    # in place of its own, so that gradients reach the weights
    return torch.func.functional_call(peer, state, (x,), {"src_mask": hidden})


def cross(part, x, other):
    """The heads of one group by their matrices."""
    q = part.q(part.norm(x))
    k, v = part.kv(part.norm_other(other)).chunk(2, -1)
    heads = []
    for a, b, c in zip(q.chunk(H, -1), k.chunk(H, -1), v.chunk(H, -1), strict=True):
        heads.append((a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c)
    return part.proj(torch.cat(heads, -1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_is_the_published_one(causal, write):
    torch.manual_seed(0)
    options = {"num_heads": H, "latent_heads": H, "causal": causal, "write": write}
    block = FITBlock(D, E, 2, 1, **options, dtype=torch.float64)
    tokens, latents = tensor(B, T, N, D), tensor(B, T, M, E, seed=1)
    groups, read = [], []
    for t in range(T):
        x = tokens[:, t]
        for layer in block.local:
            x = encoder(layer, x)
        groups.append(x)
        read.append(latents[:, t] + cross(block.read, latents[:, t], x))
    index = torch.arange(T * M) // M
    hidden = index[None] > index[:, None] if causal else None
    z = encoder(block.together[0], torch.cat(read, 1), hidden)
    z = torch.stack(z.split(M, 1), 1)
    if write:
        groups = [x + cross(block.write, x, z[:, t]) for t, x in enumerate(groups)]
    truth = (torch.stack(groups, 1), z)
    out = block(tokens, latents)
    inputs = [tokens, latents, *block.parameters()]
    for ours, wanted in zip(out, truth, strict=True):
        torch.testing.assert_close(ours, wanted)
    grads = (
        torch.autograd.grad(sum(y.square().sum() for y in pair), inputs) for pair in (out, truth)
    )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_later_groups_are_not_seen():
    torch.manual_seed(0)
    block = FITBlock(D, E, num_heads=H, latent_heads=H, causal=True, dtype=torch.float64)
    tokens, latents = tensor(B, T, N, D), tensor(B, T, M, E, seed=1)
    before = block(tokens, latents)
    with torch.no_grad():
        tokens[:, 2] += 1
    for a, b in zip(before, block(tokens, latents), strict=True):
        assert torch.equal(a[:, :2], b[:, :2]) and not torch.equal(a[:, 2], b[:, 2])


@pytest.mark.parametrize(
    "match, make",
    [
        ("multiple", lambda: FITBlock(D, 7)),
        ("global_layers", lambda: FITBlock(D, D, 1, 0)),
        ("local_layers", lambda: FITBlock(D, D, -1)),
        ("tokens", lambda: FITBlock(D, D)(torch.ones(B, N, D), torch.ones(B, T, M, D))),
        ("latents", lambda: FITBlock(D, D)(torch.ones(B, T, N, D), torch.ones(B, 1, M, D))),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
