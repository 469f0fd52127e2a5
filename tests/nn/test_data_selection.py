"""TAROT: the whitening, the layers, both selections, and the published runs."""

import math

import pytest
import torch

import weft
from weft.nn.data_selection import annealed_transport, diameter
from weft.ops.registration import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole solutions are not for an interpreter")


def clouds(n: int = 60, m: int = 20, D: int = 6):
    """Candidates of which the first third lies around the targets."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(count, D, dtype=torch.float64, generator=generator)  # noqa: E731
    targets = draw(m) + 3 * torch.eye(D, dtype=torch.float64)[0]
    near = draw(n // 3) + 3 * torch.eye(D, dtype=torch.float64)[0]
    return torch.cat([near, draw(n - n // 3) - 3 * torch.eye(D, dtype=torch.float64)[0]]), targets


def test_features_are_whitened_as_published():
    candidates, targets = clouds()
    x, y = weft.nn.TransportSelection().features(candidates, targets)
    both = torch.cat([candidates, targets])
    both = both - both.mean(0)
    covariance = both.mT @ both / len(both) + 1e-5 * torch.eye(6, dtype=torch.float64)
    expected = both @ torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.cat([x, y]), expected)


@pytest.mark.parametrize("mode", ["converged", "parity"])
def test_fixed_size_is_a_loop_over_layers(mode):
    candidates, targets = clouds()
    select = weft.nn.TransportSelection(mode=mode)
    x, y = select.features(candidates, targets)
    order = (x @ y.mT).argsort(0, descending=True)
    chosen: set[int] = set()
    for layer in order:
        new = sorted(set(layer.tolist()) - chosen)
        if len(chosen) + len(new) > 17:
            _, f, _ = select.distance(x[new], y)
            best = sorted(range(len(new)), key=lambda n: -float(f[n]))[: 17 - len(chosen)]
            chosen |= {new[n] for n in best}
            break
        chosen |= set(new)
    found = select.fixed_size(candidates, targets, 17)
    assert set(found.indices.tolist()) == chosen and len(found.indices) == 17


def test_the_chosen_lie_around_the_targets():
    candidates, targets = clouds()
    select = weft.nn.TransportSelection(folds=4)
    found = select.minimize_distance(candidates, targets)
    share = 20 / 60  # of the pool; whitening takes most of the distance between the clouds
    assert (found.indices < 20).double().mean() > 2 * share and len(found.indices) > 5
    x, y = select.features(candidates, targets)
    everything, _, _ = select.distance(x, y)
    assert found.distance < everything


def test_parity_is_geomloss():
    geomloss = pytest.importorskip("geomloss")
    x, y = weft.nn.TransportSelection().features(*clouds())
    C = (2 - 2 * x @ y.mT).abs().sqrt()
    value, f, g = annealed_transport(C, diameter(x, y))

    def cost(x, y):
        return (2 - 2 * x[0] @ y[0].mT).abs().sqrt()[None]

    options = dict(cost=cost, debias=False, blur=0.01, scaling=0.5, backend="tensorized")
    expected = geomloss.SamplesLoss("sinkhorn", **options)(x, y)
    torch.testing.assert_close(value, expected)
    F, G = geomloss.SamplesLoss("sinkhorn", potentials=True, **options)(x, y)
    torch.testing.assert_close(f, F.flatten())
    torch.testing.assert_close(g, G.flatten())


def test_parity_leaves_the_marginals_far_off():
    """What the published runs do not see: after 12 steps the plan is not one between the clouds."""
    x, y = weft.nn.TransportSelection().features(*clouds(600, 200, 16))
    C = (2 - 2 * x @ y.mT).abs().sqrt()
    _, f, g = annealed_transport(C, diameter(x, y))
    P = torch.exp((f[:, None] + g - C) / 1e-4 - math.log(C.numel()))
    assert (P.sum(1) - 1 / len(x)).abs().sum() > 0.1


def test_bad_input():
    select = weft.nn.TransportSelection()
    with pytest.raises(ValueError, match="size must be"):
        select.fixed_size(*clouds(), 61)
    with pytest.raises(ValueError, match="targets must be"):
        select.fixed_size(torch.ones(5, 3), torch.ones(5, 4), 2)
    with pytest.raises(ValueError, match="mode must be"):
        weft.nn.TransportSelection(mode="fast")
