"""Attention with exchanged keys, values or weights, against the edited matrices in float64."""

import pytest
import torch

from weft.masks import Causal
from weft.nn import (
    nested_attention,
    redistributed_attention,
    shared_subject_attention,
    sink_tokens,
    style_injection_attention,
)
from weft.ops.cases import randn

B, H, N, D = 3, 2, 6, 4


def tensor(*shape, seed=0):
    return randn(*shape, dtype=torch.float64, seed=seed).requires_grad_()


def check(out, truth, inputs):
    torch.testing.assert_close(out, truth)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_nested_attention_is_the_papers():
    q, k, v = tensor(B, H, N, D), tensor(B, H, 5, D, seed=1), tensor(B, H, 5, 3, seed=2)
    nk, nv = tensor(B, H, 7, D, seed=3), tensor(B, H, 7, 3, seed=4)
    subject = torch.tensor([0, 4, 2])
    weights = (q @ k.mT * 0.6).softmax(-1)
    special = (q @ nk.mT * 0.6).softmax(-1) @ nv
    rows = []
    for b, s in enumerate(subject.tolist()):
        others = [i for i in range(5) if i != s]
        rows.append(weights[b][..., others] @ v[b][:, others] + weights[b][..., [s]] * special[b])
    out = nested_attention(q, k, v, nk, nv, subject, scale=0.6)
    check(out, torch.stack(rows), [q, k, v, nk, nv])


def test_a_nested_value_of_one_token_is_that_value():
    q, k, v = tensor(B, H, N, D), tensor(B, H, 5, D, seed=1), tensor(B, H, 5, 3, seed=2)
    plain = (q @ k.mT / 2).softmax(-1) @ v
    subject = torch.tensor([1, 1, 1])
    torch.testing.assert_close(nested_attention(q, k, v, k[:, :, :1], v[:, :, 1:2], subject), plain)


def test_shared_subjects_are_the_papers():
    q, k, v = (tensor(B, H, N, size, seed=i) for i, size in enumerate((D, D, 3)))
    subject = torch.tensor([[1, 0, 0, 1, 0, 0], [0] * 6, [0, 0, 0, 0, 1, 1]]).bool()
    outs = []
    for i in range(B):
        keys, values = [], []
        for b in range(B):
            seen = torch.ones(N, dtype=torch.bool) if b == i else subject[b]
            keys.append(k[b][:, seen])
            values.append(v[b][:, seen])
        weights = (q[i] @ torch.cat(keys, 1).mT / 2).softmax(-1)
        outs.append(weights @ torch.cat(values, 1))
    check(shared_subject_attention(q, k, v, subject), torch.stack(outs), [q, k, v])


def test_style_injection_is_the_papers():
    content, q = tensor(B, H, N, D), tensor(B, H, N, D, seed=1)
    k, v = tensor(B, H, 5, D, seed=2), tensor(B, H, 5, 3, seed=3)
    blend = 0.75 * content + 0.25 * q
    truth = (1.5 * blend @ k.mT / D**0.5).softmax(-1) @ v
    check(style_injection_attention(content, q, k, v), truth, [content, q, k, v])


SINKS = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0, 0], [0] * 8]).bool()
VISUAL = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]).bool().expand(3, 8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("least", [0.2, 0.0, 0.9])
def test_redistribution_is_the_published_one(causal, least):
    q, k, v = (tensor(B, H, 8, size, seed=i) for i, size in enumerate((D, D, 3)))
    scores = q @ k.mT / 2
    if causal:
        scores = scores.masked_fill(~torch.ones(8, 8).tril().bool(), -torch.inf)
    weights = scores.softmax(-1)
    edited, count = weights.clone(), 0
    for b in range(B):
        for h in range(H):
            for i in range(8):
                row = weights[b, h, i]
                image = row[VISUAL[b]].sum()
                wasted = row[VISUAL[b] & SINKS[b]].sum()
                seen = VISUAL[b] & ~SINKS[b]
                if row[seen].sum() == 0 or wasted / image > 0.5 or image < least:
                    continue
                count += 1
                budget = 0.4 * row[SINKS[b]].sum()
                edited[b, h, i] = torch.where(
                    SINKS[b],
                    0.6 * row,
                    torch.where(seen, row + budget * row / row[seen].sum(), row),
                )
    assert least == 0.9 or count > 10
    options = {"mask": Causal() if causal else None, "least": least}
    out = redistributed_attention(q, k, v, SINKS, VISUAL, **options)
    check(out, edited @ v, [q, k, v])
    torch.testing.assert_close(edited.sum(-1), torch.ones(B, H, 8).double())


def test_a_row_that_sees_nothing():
    q, k, v = (tensor(B, H, 8, D, seed=i) for i in range(3))
    hidden = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    out = redistributed_attention(q, k, v, SINKS, VISUAL, mask=hidden)
    assert not out.any()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(not g.any() for g in grads)


def test_sink_tokens():
    hidden = 0.1 * randn(2, 5, 900)
    hidden[0, 3, 7] = 40.0
    hidden[1, 0, 8] = 40.0
    expected = torch.zeros(2, 5, dtype=torch.bool)
    expected[0, 3] = True
    assert torch.equal(sink_tokens(hidden, [3, 7]), expected)


def test_compiles_and_half_precision():
    q, k, v = (randn(B, H, 8, D, seed=i) for i in range(3))
    subject = torch.tensor([0, 4, 2])
    calls = [
        lambda q, k, v: nested_attention(q, k, v, k[:, :, :3], v[:, :, :3], subject),
        lambda q, k, v: shared_subject_attention(q, k, v, VISUAL),
        lambda q, k, v: style_injection_attention(k, q, k, v),
        lambda q, k, v: redistributed_attention(q, k, v, SINKS, VISUAL, mask=Causal(), least=0.0),
    ]
    for call in calls:
        torch._dynamo.reset()
        truth = call(q, k, v)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), truth)
        with torch.autocast("cpu", torch.bfloat16):
            half = call(q, k, v)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), truth, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "error, match, make",
    [
        (ValueError, "key must", lambda x, s: nested_attention(x, x[..., :2], x, x, x, s)),
        (TypeError, "subject", lambda x, s: nested_attention(x, x, x, x, x, s.double())),
        (ValueError, "subject", lambda x, s: nested_attention(x, x, x, x, x, s[:1])),
        (ValueError, "subject", lambda x, s: shared_subject_attention(x, x, x, VISUAL[:, :2])),
        (TypeError, "subject", lambda x, s: shared_subject_attention(x, x, x, s)),
        (ValueError, "content_query", lambda x, s: style_injection_attention(x[:1], x, x, x)),
        (
            ValueError,
            "temperature",
            lambda x, s: style_injection_attention(x, x, x, x, temperature=0.0),
        ),
        (ValueError, "sinks", lambda x, s: redistributed_attention(x, x, x, SINKS, VISUAL)),
        (ValueError, "dims", lambda x, s: sink_tokens(x[0], [])),
    ],
)
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make(torch.ones(B, H, N, D), torch.tensor([0, 1, 2]))
