"""Late interaction against a loop over tokens, and at the edges that the specification names."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, running

import weft
from weft.ops.cases import randn

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def by_tokens(queries, documents):
    """Lists of (tokens, D) matrices; a document without tokens has −∞."""
    out = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for a, query in enumerate(queries):
        for b, document in enumerate(documents):
            for token in query.double():
                best = max(
                    (float(token @ other) for other in document.double()), default=-torch.inf
                )
                out[a, b] += best
    return out


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_and_offsets_say_the_same(implementation, dtype):
    queries, documents = randn(3, 5, 37, dtype=dtype), randn(4, 11, 37, dtype=dtype, seed=1)
    lengths, counts = torch.tensor([5, 0, 2]), torch.tensor([7, 11, 0, 1])
    pieces = [d[:n] for d, n in zip(documents, counts, strict=True)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    with running(implementation):
        padded = weft.maxsim(queries, documents, lengths, counts)
        packed = weft.maxsim(queries, torch.cat(pieces), lengths, document_offsets=offsets)
    assert torch.equal(padded, packed)
    expected = by_tokens([q[:n] for q, n in zip(queries, lengths, strict=True)], pieces)
    torch.testing.assert_close(padded.double(), expected, rtol=1e-2, atol=1e-4)
    assert padded[0, 2].isneginf() and (padded[1] == 0).all()


@every_implementation
def test_meanings_of_padding(implementation):
    """A document whose only token is opposite to the query's."""
    queries = torch.tensor([[[1.0, 0.0]]])
    documents = torch.tensor([[[-2.0, 0.0], [9.0, 0.0]]])
    one, two = torch.tensor([1]), torch.tensor([2])
    with running(implementation):
        assert weft.maxsim(queries, documents, None, one).item() == -2
        assert weft.maxsim(queries, documents, None, one, pad="zero").item() == 0
        assert weft.maxsim(queries, documents, None, two, pad="zero").item() == 9
        assert weft.maxsim(queries, documents, pad="zero").item() == 9
        empty = weft.maxsim(queries, documents, None, torch.tensor([0]), pad="zero")
    assert empty.item() == 0


@every_implementation
def test_first_of_equal_tokens_gets_the_gradient(implementation):
    queries = torch.ones(1, 1, 3, requires_grad=True)
    documents = torch.ones(1, 600, 3).requires_grad_()
    with running(implementation):
        weft.maxsim(queries, documents).sum().backward()
    expected = torch.zeros(600, 3)
    expected[0] = 1
    assert torch.equal(documents.grad[0], expected)


@every_implementation
def test_nan_of_a_document_stays_there(implementation):
    queries, documents = randn(1, 2, 4), randn(3, 300, 4, seed=1)
    documents[1, 280] = torch.nan
    with running(implementation):
        found = weft.maxsim(queries, documents)
    assert found[0, 1].isnan() and found[0, [0, 2]].isfinite().all()


@every_implementation
def test_empty_document_has_no_gradient(implementation):
    queries, documents = randn(1, 2, 4), torch.full((2, 3, 4), torch.nan)
    documents[0] = 1
    leaves = [queries.requires_grad_(), documents.requires_grad_()]
    with running(implementation):
        found = weft.maxsim(*leaves, None, torch.tensor([3, 0]))
        found[0, 0].backward()
    assert leaves[0].grad.isfinite().all() and (leaves[1].grad[1] == 0).all()
