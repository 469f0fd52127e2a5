"""Hopfield layers against the iterated update in float64, and what theory says of it."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import (
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    hopfield_energy,
    hopfield_retrieve,
)
from weft.ops.cases import randn

B, H, N, M, D = 2, 3, 4, 5, 6


def patterns(*shape, seed=0):
    return randn(*shape, dtype=torch.float64, seed=seed)


def update(state, stored, beta):
    """One state of one head."""
    return stored.mT @ torch.softmax(beta * stored @ state, 0)


def updates(state, stored, beta, steps):
    out = state.clone()
    for b in range(state.shape[0]):
        for h in range(state.shape[1]):
            for n in range(state.shape[2]):
                x = state[b, h, n]
                for _ in range(steps):
                    x = update(x, stored[b, h], beta)
                out[b, h, n] = x
    return out


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_retrieval_is_the_published_update(steps):
    state, stored = patterns(B, H, N, D), patterns(B, H, M, D, seed=1)
    result = hopfield_retrieve(state, stored, beta=0.7, steps=steps, eps=0)
    torch.testing.assert_close(result, updates(state, stored, 0.7, steps))


def test_energy_is_the_published_one_and_falls():
    state, stored = patterns(B, H, N, D), patterns(B, H, M, D, seed=1)
    energies = []
    for _ in range(6):
        energies.append(hopfield_energy(state, stored, beta=0.7))
        state = hopfield_retrieve(state, stored, beta=0.7)
    assert (torch.stack(energies).diff(dim=0) < 1e-12).all()
    assert (energies[-1] >= 0).all()
    state = patterns(B, H, N, D)
    for b, h, n in [(0, 0, 0), (1, 2, 3)]:
        x, xi = stored[b, h], state[b, h, n]
        truth = -torch.log(torch.exp(0.7 * x @ xi).sum()) / 0.7 + xi @ xi / 2
        truth = truth + torch.tensor(M).log() / 0.7 + max(row @ row for row in x) / 2
        torch.testing.assert_close(energies[0][b, h, n], truth)


def test_gradient_of_the_energy_is_the_step():
    """The update is a gradient step of length 1: xi - E'(xi)."""
    state, stored = patterns(B, H, N, D).requires_grad_(), patterns(B, H, M, D, seed=1)
    (slope,) = torch.autograd.grad(hopfield_energy(state, stored, beta=0.7).sum(), state)
    torch.testing.assert_close(state - slope, hopfield_retrieve(state, stored, beta=0.7))


def test_stored_patterns_are_retrieved():
    """Separated patterns are fixed points up to exp(-beta separation), from noisy states too."""
    stored = 3 * F.normalize(patterns(1, 1, 20, 64), dim=-1)
    noisy = stored + 0.2 * F.normalize(patterns(1, 1, 20, 64, seed=1), dim=-1)
    for state in (stored, noisy):
        torch.testing.assert_close(
            hopfield_retrieve(state, stored, beta=8.0, steps=2), stored, atol=1e-9, rtol=0
        )
    mean = hopfield_retrieve(noisy, stored, beta=1e-6, steps=1)
    torch.testing.assert_close(
        mean, stored.mean(2, keepdim=True).expand_as(mean), atol=1e-4, rtol=0
    )


def test_until_converged():
    state, stored = patterns(B, H, N, D), patterns(B, H, M, D, seed=1)
    result = hopfield_retrieve(state, stored, beta=0.7, steps=None, eps=1e-10)
    torch.testing.assert_close(
        hopfield_retrieve(result, stored, beta=0.7), result, atol=1e-9, rtol=0
    )


def test_a_head_that_has_converged_stays():
    state, stored = patterns(B, 2, N, D), patterns(B, 2, M, D, seed=1)
    state[:, 0] = updates(state, stored, 0.7, 40)[:, 0] + 1e-6
    result = hopfield_retrieve(state, stored, beta=0.7, steps=9, eps=1e-3)
    torch.testing.assert_close(result[:, 0], updates(state, stored, 0.7, 1)[:, 0])
    assert (result[:, 1] - updates(state, stored, 0.7, 1)[:, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("normalize_heads", [False, True])
def test_layer_is_the_published_one(normalize_heads):
    torch.manual_seed(0)
    options = {"stored_size": 7, "value_size": 5, "output_size": 3, "beta": 0.4, "steps": 2}
    layer = Hopfield(8, D, H, **options, normalize_heads=normalize_heads, eps=0, dtype=torch.double)
    state, stored, value = (
        patterns(B, length, size, seed=length).requires_grad_()
        for length, size in ((N, 8), (M, 7), (M, 5))
    )
    mask = torch.ones(B, 1, 1, M, dtype=torch.bool)
    mask[1, ..., 3:] = False
    out = layer(state, stored, value, mask=mask)

    def heads(linear, norm, x, normalize):
        x = linear(norm(x)).unflatten(-1, (H, -1))
        return F.layer_norm(x, (D,)) if normalize else x

    q = heads(layer.q_proj, layer.norm_state, state, normalize_heads)
    k = heads(layer.k_proj, layer.norm_stored, stored, normalize_heads)
    v = heads(layer.v_proj, layer.norm_value, value, False)
    rows = []
    for b, seen in enumerate((M, 3)):
        for n in range(N):
            parts = []
            for h in range(H):
                xi = q[b, n, h]
                for _ in range(2):
                    xi = update(xi, k[b, :seen, h], 0.4)
                parts.append(v[b, :seen, h].mT @ torch.softmax(0.4 * k[b, :seen, h] @ xi, 0))
            rows.append(layer.out_proj(torch.cat(parts)))
    truth = torch.stack(rows).view(B, N, 3)
    torch.testing.assert_close(out, truth)
    inputs = [state, stored, value, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_without_updates_it_is_multihead_attention():
    torch.manual_seed(0)
    layer = Hopfield(12, num_heads=H, normalize=False, dtype=torch.float64)
    peer = torch.nn.MultiheadAttention(12, H, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for own, weight, bias in zip(
            (layer.q_proj, layer.k_proj, layer.v_proj),
            peer.in_proj_weight.chunk(3),
            peer.in_proj_bias.chunk(3),
            strict=True,
        ):
            own.weight.copy_(weight)
            own.bias.copy_(bias)
        layer.out_proj.load_state_dict(peer.out_proj.state_dict())
    state, stored = patterns(B, N, 12), patterns(B, M, 12, seed=1)
    torch.testing.assert_close(layer(state, stored), peer(state, stored, stored)[0])


def test_pooling_is_attention_of_learned_queries():
    torch.manual_seed(0)
    pool = HopfieldPooling(6, 2, head_dim=4, num_heads=H, output_size=5, dtype=torch.float64)
    stored = patterns(B, M, 6)
    expected = pool.hopfield(pool.states.expand(B, 2, 6), stored)
    assert pool(stored).shape == (B, 10)
    torch.testing.assert_close(pool(stored), expected.flatten(1))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(pool(stored[:, order]), pool(stored))
    mask = torch.tensor([True, True, True, False, False])[None, None, None]
    torch.testing.assert_close(pool(stored, mask=mask), pool(stored[:, :3]))


@pytest.mark.parametrize("separate", [False, True])
def test_lookup_reads_learned_patterns(separate):
    torch.manual_seed(0)
    options = {"project": False, "normalize": False, "beta": 20.0}
    layer = HopfieldLayer(6, M, separate_values=separate, **options, dtype=torch.float64)
    with torch.no_grad():
        layer.stored.copy_(2 * torch.eye(M, 6))
    state = 2 * torch.eye(M, 6, dtype=torch.float64)[None, [2, 0, 2]]
    read = layer.values if separate else layer.stored
    torch.testing.assert_close(layer(state)[0], read[[2, 0, 2]])


@pytest.mark.parametrize(
    "error, match, make",
    [
        (ValueError, "multiple of num_heads", lambda: Hopfield(8, num_heads=3)),
        (ValueError, "beta", lambda: Hopfield(8, beta=0.0)),
        (ValueError, "steps", lambda: Hopfield(8, steps=-1)),
        (ValueError, "eps", lambda: Hopfield(8, eps=-1.0)),
        (ValueError, "dropout", lambda: Hopfield(8, dropout=1.0)),
        (ValueError, "without projections", lambda: Hopfield(8, num_heads=2, project=False)),
        (ValueError, "quantity", lambda: HopfieldPooling(8, 0)),
        (ValueError, "value_size", lambda: HopfieldLayer(8, 2, value_size=4)),
        (ValueError, "state must", lambda: Hopfield(8)(torch.ones(2, 3, 7), torch.ones(2, 3, 8))),
        (ValueError, "stored must", lambda: Hopfield(8)(torch.ones(2, 3, 8), torch.ones(1, 3, 8))),
        (
            ValueError,
            "3 patterns",
            lambda: Hopfield(8)(*[torch.ones(2, 3, 8)] * 2, torch.ones(2, 2, 8)),
        ),
        (TypeError, "state", lambda: HopfieldLayer(8)(torch.ones(2, 3, 8, dtype=torch.int64))),
        (ValueError, "state must", lambda: hopfield_retrieve(*[torch.ones(2, 3, 4)] * 2)),
        (
            ValueError,
            "at least one",
            lambda: hopfield_energy(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 0, 2)),
        ),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()
