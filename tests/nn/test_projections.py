"""Concept projections against least squares and the eigenvectors of a second moment."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import (
    ConceptProjection,
    concept_basis,
    knn_anomaly_score,
    prompt_differences,
    remove_directions,
)
from weft.ops.cases import randn


def test_basis_is_the_main_directions():
    vectors = randn(9, 6, dtype=torch.float64)
    basis = concept_basis(vectors, 2)
    _, eigenvectors = torch.linalg.eigh(vectors.mT @ vectors)
    expected = eigenvectors[:, -2:]
    torch.testing.assert_close(basis @ basis.mT, expected @ expected.mT)
    flipped = vectors * torch.tensor([1.0, -1, 1] * 3, dtype=torch.float64)[:, None]
    again = concept_basis(flipped[torch.randperm(9)], 2)
    torch.testing.assert_close(again @ again.mT, basis @ basis.mT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_vectors_that_depend_on_each_other_name_fewer_directions(dtype):
    vector = randn(1, 6)
    vectors = torch.cat([vector, 2 * vector, -vector]).to(dtype)
    basis = concept_basis(vectors)
    assert basis.dtype == dtype and basis.shape == (6, 3)
    assert (basis.double().norm(dim=0) > 0.5).tolist() == [True, False, False]
    assert not concept_basis(torch.zeros(2, 4)).any()


def test_differences_of_prompts():
    a, b, c = (randn(n, 4, seed=n) for n in (1, 2, 3))
    one = prompt_differences(c)
    assert torch.equal(one, torch.stack([c[0] - c[1], c[0] - c[2], c[1] - c[2]]))
    several = prompt_differences(a, b, c)
    pairs = [(p, q) for x, y in ((a, b), (a, c), (b, c)) for p in x for q in y]
    assert torch.equal(several, torch.stack([p - q for p, q in pairs]))


@pytest.mark.parametrize("mode", ["guide", "ignore"])
def test_projection_is_a_least_squares_fit(mode):
    vectors, x = randn(3, 8, dtype=torch.float64), randn(2, 5, 8, dtype=torch.float64, seed=1)
    fit = torch.linalg.lstsq(vectors.mT, x.reshape(-1, 8).mT).solution
    guided = (vectors.mT @ fit).mT.reshape(x.shape)
    result = ConceptProjection(vectors, mode=mode)(x)
    torch.testing.assert_close(result, guided if mode == "guide" else x - guided)


def test_projection_of_rank_one_is_the_published_single_vector_form():
    vectors = randn(1, 8, dtype=torch.float64)
    x = randn(5, 8, dtype=torch.float64, seed=1)
    expected = (x @ vectors.mT) / vectors.square().sum() * vectors
    torch.testing.assert_close(ConceptProjection(vectors, 1)(x), expected)


def test_anomalies_of_the_attribute_alone():
    """Samples unusual in one attribute score high where it guides, and not where it is ignored."""
    torch.manual_seed(0)
    concept, other = F.normalize(randn(2, 16), dim=1)
    noise = lambda n: 0.05 * torch.randn(n, 16)  # noqa: E731
    normal = concept + other * torch.linspace(-1, 1, 50)[:, None] + noise(50)
    unusual = -concept + other * torch.linspace(-1, 1, 10)[:, None] + noise(10)
    direction = prompt_differences(concept[None] + noise(3), -concept[None] + noise(3))
    guide, ignore = (ConceptProjection(direction, 1, mode=m) for m in ("guide", "ignore"))
    assert knn_anomaly_score(guide(unusual), guide(normal), 5).min() > 1.9
    assert knn_anomaly_score(guide(normal), guide(normal), 5).max() < 0.1
    ignored = knn_anomaly_score(ignore(unusual), ignore(normal), 5)
    assert ignored.mean() < 0.5


def test_anomaly_score_is_a_mean_of_sorted_distances():
    x, normal = randn(4, 6, dtype=torch.float64), randn(9, 6, dtype=torch.float64, seed=1)
    distances = 1 - F.cosine_similarity(x[:, None], normal, dim=-1)
    expected = distances.sort(1).values[:, :3].mean(1)
    torch.testing.assert_close(knn_anomaly_score(x, normal, 3), expected)
    torch.testing.assert_close(knn_anomaly_score(x, normal, 30), distances.mean(1))


@pytest.mark.parametrize("strength", [1.0, 0.4, 0.0])
def test_removal_of_undesired_tokens(strength):
    undesired = randn(3, 8, dtype=torch.float64)
    x = randn(2, 5, 8, dtype=torch.float64, seed=1).requires_grad_()
    projector = undesired.mT @ torch.linalg.pinv(undesired @ undesired.mT) @ undesired
    result = remove_directions(x, undesired, strength=strength)
    torch.testing.assert_close(result, x - strength * x @ projector)
    if strength == 1:
        assert (result @ undesired.mT).abs().max() < 1e-12
    repeated = torch.cat([undesired, undesired])  # a span is a span
    torch.testing.assert_close(remove_directions(x, repeated, strength=strength), result)
    assert torch.autograd.gradcheck(lambda v: remove_directions(v, undesired, strength=0.4), x)


@pytest.mark.parametrize(
    "match, make",
    [
        ("rank", lambda: concept_basis(torch.ones(2, 3), 3)),
        ("vectors", lambda: concept_basis(torch.ones(0, 3))),
        ("groups", lambda: prompt_differences()),
        ("groups", lambda: prompt_differences(torch.ones(1, 3))),
        ("groups", lambda: prompt_differences(torch.ones(1, 3), torch.ones(1, 4))),
        ("mode", lambda: ConceptProjection(torch.ones(1, 3), mode="keep")),
        ("normal", lambda: knn_anomaly_score(torch.ones(1, 3), torch.ones(0, 3))),
        ("k must be", lambda: knn_anomaly_score(torch.ones(1, 3), torch.ones(1, 3), 0)),
        ("undesired", lambda: remove_directions(torch.ones(1, 3), torch.ones(1, 4))),
    ],
)
def test_refuses(match, make):
    with pytest.raises(ValueError, match=match):
        make()
