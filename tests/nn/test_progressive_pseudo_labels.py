"""P²OT's and SP²OT's pseudo-labels: schedule, memory, graph."""

import math

import pytest
import torch
from torch.nn import functional as F

import weft
from weft.nn import ProgressivePseudoLabels, neighbor_graph


def batches(count, n=8, K=4):
    torch.manual_seed(0)
    return [2 * torch.randn(n, K, dtype=torch.float64) for _ in range(count)]


def test_schedule_and_memory():
    options = {"epsilon": 0.5}
    layer = ProgressivePseudoLabels(4, 3, memory=20, initial_mass=0.2, **options)
    data = batches(5)
    for t, logits in enumerate(data):
        mass = 0.2 + 0.8 * math.exp(-5 * (1 - min(t / 3, 1)) ** 2)
        assert layer.mass == pytest.approx(mass)
        known = torch.cat(data[: t + 1])[-20:]
        expected = weft.progressive_partial_transport(known, mass, **options) * len(known)
        labels = layer(logits)
        torch.testing.assert_close(labels, expected[-8:])
        assert (labels.sum(1) <= 1 + 1e-6).all()
    assert int(layer.step) == 5 and layer.mass == 1.0
    layer.eval()
    assert torch.equal(layer(data[0]), layer(data[0])) and int(layer.step) == 5
    fresh = ProgressivePseudoLabels(4, 3, memory=20)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.mass == 1.0


def test_graph():
    """Cosines of the nearest others; SP²OT's λ₁ falls with ρ and is 0 at the end."""
    (logits,) = batches(1, n=12)
    features = torch.randn(12, 5, dtype=torch.float64)
    unit = F.normalize(features, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-1)
    S = torch.zeros(12, 12, dtype=torch.float64)
    for i in range(12):
        for j in cosine[i].argsort(descending=True)[:3].tolist():
            S[i, j] = cosine[i, j].clamp_min(0)
    torch.testing.assert_close(neighbor_graph(features, 3).to_dense(), S)
    options = {"memory": 0, "initial_mass": 0.3, "neighbors": 3}
    options |= {"outer_iterations": 2, "epsilon": 0.5}
    layer = ProgressivePseudoLabels(4, 1, graph_strength=50.0, **options)
    mass = layer.mass
    expected = weft.progressive_partial_transport(
        logits, mass, graph=S, graph_strength=50.0 * (1 - mass), outer_iterations=2, epsilon=0.5
    )
    plain = weft.progressive_partial_transport(logits, mass, epsilon=0.5)
    torch.testing.assert_close(layer(logits, features), 12 * expected)
    assert (expected - plain).abs().max() > 1e-3
    last = layer(logits, features)
    torch.testing.assert_close(
        last, 12 * weft.progressive_partial_transport(logits, 1.0, epsilon=0.5)
    )


def test_errors():
    (logits,) = batches(1)
    with pytest.raises(ValueError, match="does not fit"):
        ProgressivePseudoLabels(4, 3, memory=4)(logits)
    with pytest.raises(ValueError, match="features must be given"):
        ProgressivePseudoLabels(4, 3, graph_strength=1.0)(logits)
    with pytest.raises(ValueError, match="initial_mass"):
        ProgressivePseudoLabels(4, 3, initial_mass=0.0)
