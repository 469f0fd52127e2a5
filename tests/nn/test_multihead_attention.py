"""MultiheadAttention against torch's module, in float64: outputs, weights, all gradients."""

import copy

import pytest
import torch
from torch import nn

import weft
from weft.masks import Causal, Window
from weft.nn import MultiheadAttention
from weft.nn.attention import multihead
from weft.ops.cases import randn

N, L, S, E, H = 3, 5, 7, 12, 2
F64 = torch.float64
TRIANGLE = torch.ones(L, S, dtype=torch.bool).triu(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(seed: int = 0, **options) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours with the same parameters, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, dtype=F64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    ours = MultiheadAttention(E, H, dtype=F64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module: nn.MultiheadAttention, *, batched: bool = True) -> list[torch.Tensor]:
    sizes = ((L, E), (S, module.kdim), (S, module.vdim))
    shapes = [(n, N, e) if batched else (n, e) for n, e in sizes]
    tensors = [randn(*shape, dtype=F64) for shape in shapes]
    if batched and module.batch_first:
        tensors = [x.transpose(0, 1).contiguous() for x in tensors]
    return [x.requires_grad_() for x in tensors]


def run(module, tensors, *more, upstream_of_weights=True, **masks) -> list[torch.Tensor | None]:
    """Output, weights, and the gradients of inputs, parameters and what else is in ``more``."""
    out, weights = module(*tensors, **masks)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)).sum()
    if weights is not None and upstream_of_weights:
        loss = (
            loss
            + (weights * torch.linspace(-1, 2, weights.numel(), dtype=F64).view_as(weights)).sum()
        )
    wanted = [*tensors, *more, *module.parameters()]
    return [out, weights, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def mask(kind: str) -> dict:
    padding = torch.arange(S) >= torch.tensor([[S], [4], [1]])
    random = torch.rand(N * H, L, S, generator=torch.Generator().manual_seed(1)) < 0.5
    random[..., 0] = False  # no query without keys: torch gives NaN there
    floats = randn(N * H, L, S, dtype=F64)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "padding floats": {"key_padding_mask": randn(N, S, dtype=F64)},
        "pairs": {"attn_mask": TRIANGLE},
        "pairs floats": {"attn_mask": floats[0]},
        "pairs of heads": {"attn_mask": random},
        "pairs of heads floats": {"attn_mask": floats},
        "both": {"attn_mask": random, "key_padding_mask": padding},
        "both floats": {
            "attn_mask": floats,
            "key_padding_mask": torch.zeros(N, S, dtype=F64).masked_fill(padding, -torch.inf),
        },
        "causal": {"attn_mask": TRIANGLE, "is_causal": True},
        "causal and padding": {
            "attn_mask": TRIANGLE,
            "is_causal": True,
            "key_padding_mask": padding,
        },
    }[kind]


MASKS = [
    "none",
    "padding",
    "padding floats",
    "pairs",
    "pairs floats",
    "pairs of heads",
    "pairs of heads floats",
    "both",
    "both floats",
    "causal",
    "causal and padding",
]
OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 8, "vdim": 10},
    {"kdim": 8, "bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]
every_mask = pytest.mark.parametrize("kind", MASKS)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")


@every_mask
@every_option
def test_as_torch(options, kind):
    theirs, ours = pair(**options)
    x = inputs(theirs)
    expected = run(theirs, x, average_attn_weights=False, **mask(kind))
    assert_same(run(ours, x, average_attn_weights=False, **mask(kind)), expected)
    # torch's module hides the key of add_bias_kv under is_causal without weights: as with them
    expected = run(theirs, x, upstream_of_weights=False, **mask(kind))
    assert_same(run(ours, x, need_weights=False, **mask(kind)), [expected[0], None, *expected[2:]])


@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(batch_first):
    theirs, ours = pair(batch_first=batch_first, add_bias_kv=True)
    x = inputs(theirs, batched=False)
    hidden = torch.arange(S) >= 5
    for masks in (
        {},
        {"key_padding_mask": hidden},
        {"attn_mask": TRIANGLE},
        {"attn_mask": TRIANGLE.expand(H, L, S), "key_padding_mask": hidden},
    ):
        assert_same(run(ours, x, **masks), run(theirs, x, **masks))


def test_self_attention_projects_at_once():
    theirs, ours = pair(batch_first=True)
    x = randn(N, S, E, dtype=F64).requires_grad_()
    results = []
    for module in (ours, theirs):
        out, weights = module(x, x, x)
        results.append(
            [out, weights, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])]
        )
    assert_same(*results)


def test_state_dict_goes_both_ways():
    for options in OPTIONS:
        theirs, ours = pair(**options)
        shapes = {name: value.shape for name, value in ours.state_dict().items()}
        assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
        fresh = MultiheadAttention(E, H, dtype=F64, **options)
        theirs.load_state_dict(fresh.state_dict())
        x = inputs(theirs)
        assert_same(run(fresh, x), run(theirs, x))
        fresh._reset_parameters()
        assert all(p.isfinite().all() for p in fresh.parameters())


@pytest.mark.parametrize("options", OPTIONS[-3:], ids=lambda o: "-".join(o))
def test_a_query_without_keys(options):
    """Weights of zero and the bias of out_proj, without NaN anywhere; the others as in torch."""
    theirs, ours = pair(**{**options, "add_zero_attn": False, "add_bias_kv": False})
    x = inputs(theirs)
    blind = torch.zeros(L, S, dtype=torch.bool)
    blind[2] = True
    for hide in (blind, torch.zeros(L, S, dtype=F64).masked_fill(blind, -torch.inf)):
        out, weights, *gradients = run(ours, x, attn_mask=hide)
        rows = out.transpose(0, 1) if not theirs.batch_first else out
        torch.testing.assert_close(rows[:, 2], ours.out_proj.bias.expand(N, E))
        assert not weights[:, 2].any()
        assert all(g.isfinite().all() for g in gradients)
        expected, expected_weights = theirs(*x, attn_mask=hide)
        others = [0, 1, 3, 4]
        expected = expected.transpose(0, 1) if not theirs.batch_first else expected
        torch.testing.assert_close(rows[:, others], expected[:, others])
        torch.testing.assert_close(weights[:, others], expected_weights[:, others])


def test_padding_that_holds_nan():
    _, ours = pair(batch_first=True)
    q, k, v = (x.detach() for x in inputs(ours))
    hidden = torch.arange(S).expand(N, S) >= 4
    expected, _ = ours(q, k, v, hidden, need_weights=False)
    k, v = (x.masked_fill(hidden[..., None], torch.nan) for x in (k, v))
    assert torch.equal(ours(q, k, v, hidden, need_weights=False)[0], expected)


def test_more_than_torch():
    theirs, ours = pair()
    x = inputs(theirs)
    band = Window(2, 1).to_dense((L, S))
    assert_same(run(ours, x, attn_mask=Window(2, 1)), run(theirs, x, attn_mask=~band))
    causal = run(theirs, x, attn_mask=TRIANGLE)
    assert_same(run(ours, x, is_causal=True), causal)
    assert_same(run(ours, x, attn_mask=Causal()), causal)
    bias = randn(H, L, S, dtype=F64).requires_grad_()
    expected = run(theirs, x, bias, attn_mask=bias.repeat(N, 1, 1))
    assert_same(run(ours, x, bias, bias=bias), expected)


@torch.no_grad()
def test_dropout():
    theirs, ours = pair(dropout=0.4, batch_first=True)
    x = [t[:1].repeat(2000, 1, 1) for t in inputs(theirs)]
    exact, weights = theirs.eval()(*x)
    assert_same(ours.eval()(*x), (exact, weights))
    ours.train()
    torch.manual_seed(0)
    out, given = ours(*x)
    torch.testing.assert_close(given, weights)  # those before dropout
    error = (out.mean(0) - exact[0]).abs() / (out.std(0) / 2000**0.5)
    assert error.max() < 6  # standard errors
    torch.manual_seed(0)
    assert torch.equal(ours(*x)[0], out)
    assert not torch.allclose(ours(*x)[0], out)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_in_a_transformer_encoder_layer(norm_first, training, monkeypatch):
    options = dict(dim_feedforward=16, dropout=0.0, batch_first=True, dtype=F64)
    layer = nn.TransformerEncoderLayer(E, H, norm_first=norm_first, **options).train(training)
    ours = copy.deepcopy(layer)
    ours.self_attn = MultiheadAttention(E, H, batch_first=True, dtype=F64).train(training)
    ours.self_attn.load_state_dict(layer.self_attn.state_dict())
    x = randn(N, S, E, dtype=F64)
    hidden = torch.arange(S) >= torch.tensor([[S], [4], [2]])
    triangle = torch.ones(S, S, dtype=torch.bool).triu(1)
    calls = []
    attention = multihead.attention
    monkeypatch.setattr(
        multihead, "attention", lambda *a, **k: calls.append(k) or attention(*a, **k)
    )
    for masks in ({}, {"src_key_padding_mask": hidden}, {"src_mask": triangle, "is_causal": True}):
        with torch.no_grad():  # where torch's own would take the fused layer
            seen = ~masks.get("src_key_padding_mask", torch.zeros(N, S, dtype=torch.bool))
            torch.testing.assert_close(ours(x, **masks)[seen], layer(x, **masks)[seen])
    # the layer makes floats of bool masks: they are masks again
    assert [call["mask"] is None for call in calls] == [True, False, False]
    assert all(call["bias"] is None for call in calls)


def test_patched_encoder():
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, dtype=F64)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = randn(N, S, E, dtype=F64)
    hidden = torch.arange(S) >= torch.tensor([[S], [4], [2]])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=hidden)
        names = list(encoder.state_dict())
        assert weft.patch(encoder) is encoder and list(encoder.state_dict()) == names
        actual = encoder(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(actual[~hidden], expected[~hidden])


def test_compiled():
    _, ours = pair(add_bias_kv=True)
    x = inputs(ours)
    padding = mask("padding")["key_padding_mask"]

    def call(q, k, v):
        return ours(q, k, v, key_padding_mask=padding, is_causal=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected, actual = call(*x), compiled(*x)
    assert_same(actual, expected)
    gradients = [torch.autograd.grad(out.sin().sum(), x) for out, _ in (actual, expected)]
    assert_same(*gradients)


@pytest.mark.parametrize(
    "change, error, name",
    [
        ({"query": randn(L, N, E + 1, dtype=F64)}, ValueError, "query"),
        ({"key": randn(S, N, E).long()}, TypeError, "key"),
        ({"value": randn(S + 1, N, E, dtype=F64)}, ValueError, "value"),
        ({"key": randn(S, E, dtype=F64)}, ValueError, "key"),
        ({"attn_mask": torch.zeros(S, L, dtype=torch.bool)}, ValueError, "attn_mask"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, TypeError, "attn_mask"),
        ({"key_padding_mask": torch.zeros(S, N, dtype=torch.bool)}, ValueError, "key_padding"),
        ({"bias": torch.zeros(H, L, S, dtype=torch.bool)}, TypeError, "bias"),
    ],
)
def test_bad_arguments(change, error, name):
    _, ours = pair()
    arguments = dict(zip(("query", "key", "value"), inputs(ours), strict=True))
    with pytest.raises(error, match=name):
        ours(**{**arguments, **change})
