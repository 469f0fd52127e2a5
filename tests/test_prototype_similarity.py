"""Similarities of prototypes against all distances in float64, and the edges specified."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, running

import weft
from weft.ops.cases import randn

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def least_distances(features, prototypes):
    """(distance, first position) of all places in float64, from differences."""
    rows = features.double().flatten(2).mT
    d = (rows[:, None] - prototypes.double()[:, None]).square().sum(-1)
    return d.amin(-1), (-d).argmax(-1)


@every_implementation
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distances_and_positions(implementation, offset, dtype):
    """Also far from the origin, where the expanded square would lose the distance."""
    features = (randn(3, 33, 5, 7) + offset).to(dtype)
    prototypes = (features.flatten(2)[0, :, :30].T + 0.01 * randn(30, 33, seed=1)).to(dtype)
    with running(implementation):
        found = weft.prototype_similarity(features, prototypes, "linear")
    distance, position = least_distances(features, prototypes)
    assert torch.equal(found.positions, position)
    torch.testing.assert_close(-found.similarities.double(), distance, rtol=1e-5, atol=0)


@every_implementation
def test_activations(implementation):
    features, prototypes = 0.3 * randn(2, 4, 3, 3), 0.3 * randn(5, 4, seed=1)
    d = least_distances(features, prototypes)[0].float()
    expected = {"log": ((d + 1) / (d + 0.01)).log(), "linear": -d, "rbf": (-2 * d).exp()}
    with running(implementation):
        for name, value in expected.items():
            found = weft.prototype_similarity(features, prototypes, name, eps=0.01, gamma=2.0)
            torch.testing.assert_close(found.similarities, value)


@every_implementation
def test_first_of_equal_places(implementation):
    """Also a prototype that is one of the places, at distance 0."""
    features = torch.cat([randn(2, 3, 4, 6)] * 2, 3)
    prototypes = features[0, :, 1, :5].T.contiguous()
    with running(implementation):
        found = weft.prototype_similarity(features, prototypes)
    assert torch.equal(found.positions, least_distances(features, prototypes)[1])
    assert found.positions[0].tolist() == [12, 13, 14, 15, 16]
    assert torch.allclose(found.similarities[0], torch.tensor(1e4).log())


@every_implementation
@pytest.mark.parametrize("activation, value", [("log", 0.0), ("linear", -torch.inf), ("rbf", 0.0)])
def test_no_places_and_no_prototypes(implementation, activation, value):
    with running(implementation):
        empty = weft.prototype_similarity(torch.ones(2, 4, 0, 3), torch.ones(5, 4), activation)
        none = weft.prototype_similarity(torch.ones(2, 4, 3, 3), torch.ones(0, 4), activation)
    assert (empty.similarities == value).all() and (empty.positions == -1).all()
    assert none.similarities.shape == none.positions.shape == (2, 0)


@every_implementation
def test_nan_propagates(implementation):
    features, prototypes = randn(2, 4, 3, 3), randn(5, 4, seed=1)
    features[1, :, 2, 1] = torch.nan
    with running(implementation):
        found = weft.prototype_similarity(features, prototypes)
    assert found.similarities[0].isfinite().all() and found.similarities[1].isnan().all()
    assert (found.positions[1] == 7).all()
