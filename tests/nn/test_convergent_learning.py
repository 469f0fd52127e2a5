"""Correlations of units against NumPy, and their matchings against all permutations."""

import itertools

import pytest
import torch

from weft.nn import UnitCorrelation, match_units
from weft.ops.cases import randn


def test_correlation_of_batches_is_that_of_all():
    """Far from the origin, of vectors and of maps, whose places are samples."""
    x = randn(30, 4, dtype=torch.float64) + 1e4
    y = x @ randn(4, 3, dtype=torch.float64, seed=1) + randn(30, 3, dtype=torch.float64, seed=2)
    expected = torch.corrcoef(torch.cat([x, y], 1).T)
    layer = UnitCorrelation(4, 3, dtype=torch.float64)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 30)):
        layer.update(x[rows], y[rows])
    torch.testing.assert_close(layer(), expected[:4, 4:])
    torch.testing.assert_close(layer.within(0), expected[:4, :4])
    torch.testing.assert_close(layer.within(1), expected[4:, 4:])
    of_maps = UnitCorrelation(4, 3, dtype=torch.float64)
    of_maps.update(*(t.view(5, 2, 3, -1).permute(0, 3, 1, 2) for t in (x, y)))
    torch.testing.assert_close(of_maps(), layer())


def test_a_unit_that_never_changes():
    x = randn(10, 2)
    x[:, 1] = 3
    layer = UnitCorrelation(2, 2)
    layer.update(x, x)
    torch.testing.assert_close(layer(), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(UnitCorrelation(2, 3)(), torch.zeros(2, 3))


def by_hand(c, method):
    D1, D2 = c.shape
    if method == "many":
        return [max(range(D2), key=c[i].tolist().__getitem__) for i in range(D1)]
    if method == "bipartite":
        best = max(
            itertools.permutations([*range(D2), *[-1] * max(0, D1 - D2)], D1),
            key=lambda p: sum(float(c[i, j]) for i, j in enumerate(p) if j >= 0),
        )
        return [*best]
    found, left = [-1] * D1, c.clone()
    for _ in range(min(D1, D2)):
        i, j = divmod(int(left.argmax()), D2)
        found[i] = j
        left[i], left[:, j] = -torch.inf, -torch.inf
    return found


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("method", ["bipartite", "greedy", "many"])
def test_matching(method, shape):
    if method == "bipartite":
        pytest.importorskip("scipy")
    c = randn(*shape, dtype=torch.float64, seed=3).tanh()
    found = match_units(c, method)
    expected = by_hand(c, method)
    assert found.indices.tolist() == expected
    values = [float(c[i, j]) if j >= 0 else 0.0 for i, j in enumerate(expected)]
    assert found.correlation.tolist() == values


def test_a_permuted_network_is_found_again():
    pytest.importorskip("scipy")
    x, order = randn(50, 6), torch.tensor([3, 1, 5, 0, 2, 4])
    layer = UnitCorrelation(6, 6)
    layer.update(x, 2 * x[:, order] - 1)
    for method in ("bipartite", "greedy", "many"):
        found = match_units(layer(), method)
        assert torch.equal(order[found.indices], torch.arange(6))
        torch.testing.assert_close(found.correlation, torch.ones(6))


def test_bad_arguments():
    layer = UnitCorrelation(2, 3)
    with pytest.raises(ValueError, match=r"y must be \(N, 3\)"):
        layer.update(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="samples and places of x"):
        layer.update(torch.ones(4, 2), torch.ones(5, 3))
    with pytest.raises(ValueError, match="method must be one of"):
        match_units(torch.ones(2, 2), "best")
    with pytest.raises(ValueError, match="correlation must be finite"):
        match_units(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="network must be 0 or 1"):
        layer.within(2)
