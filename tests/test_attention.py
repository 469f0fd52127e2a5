"""Attention: what its masks, biases and options mean, against loops and closed forms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import weft
from weft import masks
from weft.ops.attention.cases.inputs import plain_attention, tokens


def from_rule(Nq: int, Nk: int, rule) -> torch.Tensor:
    return torch.tensor([[bool(rule(i, j)) for j in range(Nk)] for i in range(Nq)])


def window_of(p: int, size: int, kernel: int, dilation: int) -> set[int]:
    """The `kernel` positions of p's residue that are nearest to p, the lower ones on a tie."""
    own = [q for q in range(size) if q % dilation == p % dilation]
    at = own.index(p)
    start = min(max(at - kernel // 2, 0), len(own) - kernel)
    return set(own[start : start + kernel])


def test_rules_are_what_they_say():
    cases = [
        (masks.Causal(), lambda i, j: j <= i),
        (masks.Causal(-2), lambda i, j: j <= i - 2),
        (masks.Window(3, 1), lambda i, j: i - 3 <= j <= i + 1),
        (masks.Window(2, None, 4), lambda i, j: i + 4 - 2 <= j),
        (masks.Lengths(torch.tensor([5]), torch.tensor([7])), lambda i, j: i < 5 and j < 7),
        (masks.Blocks(torch.eye(4).bool()[:, :3], (3, 5)), lambda i, j: i // 3 == j // 5),
        (
            masks.Segments(torch.arange(11) // 4, torch.arange(13) // 5),
            lambda i, j: i // 4 == j // 5,
        ),
        (~masks.Causal() | masks.Window(0, 0), lambda i, j: j > i or j == i),
        (
            masks.Causal() & masks.Dense(torch.arange(13) % 3 == 0),
            lambda i, j: j <= i and j % 3 == 0,
        ),
    ]
    for mask, rule in cases:
        assert torch.equal(mask.to_dense((11, 13)), from_rule(11, 13, rule)), str(mask)


@pytest.mark.parametrize("kernel, dilation", [(1, 1), (3, 1), (4, 1), (2, 3), (3, 2)])
def test_neighborhoods_are_the_nearest_positions(kernel, dilation):
    shape = (7, 6)
    mask = masks.Neighborhood(shape, kernel, dilation)

    def sees(i, j):
        at, to = divmod(i, 6), divmod(j, 6)
        return all(
            q in window_of(p, n, kernel, dilation) for p, q, n in zip(at, to, shape, strict=True)
        )

    dense = mask.to_dense((42, 42))
    assert torch.equal(dense, from_rule(42, 42, sees))
    assert (dense.sum(1) == kernel**2).all()
    line = masks.Neighborhood((9,), kernel, dilation).to_dense((9, 9))
    assert all(set(row.nonzero()[:, 0].tolist()) == window_of(p, 9, kernel, dilation)
               for p, row in enumerate(line))  # fmt: skip


def test_lengths_and_labels_belong_to_batches():
    lengths = torch.tensor([0, 2, 5])
    dense = masks.Lengths(key=lengths).to_dense((3, 2, 4, 5))
    assert torch.equal(dense.sum((1, 2, 3)), lengths * 8)
    ids = torch.randint(3, (2, 6))
    dense = masks.Segments(ids).to_dense((4, 1, 6, 6))
    for b in range(4):  # labels of two windows serve four
        assert torch.equal(dense[b, 0], ids[b % 2][:, None] == ids[b % 2])


def test_a_plan_is_the_mask_and_prints_it():
    shape = (2, 3, 70, 130)
    mask = (masks.Causal(9) | (torch.rand(2, 1, 70, 130) > 0.7)) & ~masks.Window(3, 5)
    plan = mask.plan(shape)
    assert torch.equal(plan.to_dense(shape), mask.to_dense(shape))
    assert plan.words.shape == (2, 1, 70, 3) and plan.states.shape == (2, 1, 2, 3)
    drawing = str(masks.Causal(15).plan((16, 32)))
    assert drawing.splitlines()[1] == "█" * 16 + "·" * 16
    assert drawing.splitlines()[-1] == "█" * 31 + "·"
    half = masks.Window(None, 0).plan((128, 128))
    assert half.states.tolist() == [[[[1, 0], [2, 1]]]] and half.skipped() == 0.25
    q, k, v = tokens(2, 3, 70, 130, 8)(torch.float32, "cpu")
    assert torch.equal(weft.attention(q, k, v, mask=plan), weft.attention(q, k, v, mask=mask))


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: masks.Window(-1, 0), ValueError, "left must be >= 0"),
        (lambda: masks.Window(0, -1), ValueError, "right must be >= 0"),
        (lambda: masks.Lengths(), ValueError, "must have query, key or both"),
        (lambda: masks.Lengths(key=torch.ones(2)), TypeError, "key must be a tensor of int64"),
        (lambda: masks.Segments(torch.ones(2)), TypeError, "query_ids must be a tensor of int64"),
        (lambda: masks.Neighborhood((4, 4), 5), ValueError, "kernel times dilation"),
        (lambda: masks.Neighborhood((4, 4), (3,)), ValueError, "kernel must be 2 integers"),
        (lambda: masks.Neighborhood((), 3), ValueError, "shape must be 1 to 3"),
        (lambda: masks.Blocks(torch.ones(2, 2), 3), TypeError, "block_mask must be a tensor of bo"),
        (lambda: masks.Blocks(torch.ones(2, 2).bool(), 0), ValueError, "block_size must be one"),
        (lambda: masks.Dense(torch.ones(2)), TypeError, "mask must be a tensor of bool"),
        (lambda: masks.Causal().to_dense((3,)), ValueError, "shape must be"),
    ],
)
def test_bad_masks(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_plan_of_another_shape_is_refused():
    plan = masks.Causal().plan((1, 1, 3, 5))
    with pytest.raises(ValueError, match="plan was made for"):
        weft.attention(*tokens(2, 2, 3, 6, 4)(torch.float32, "cpu"), mask=plan)


def test_biases_are_their_matrices():
    q, k, v = tokens(2, 2, 7, 7, 4)(torch.float64, "cpu")
    table, index = torch.randn(5, 2).double(), torch.randint(5, (7, 7))
    relative = weft.RelativeBias(table, index)
    expected = torch.stack([torch.stack([table[index[i, j]] for j in range(7)]) for i in range(7)])
    assert torch.equal(relative.to_dense(), expected.permute(2, 0, 1)[None])
    weight, sigma = torch.randn(2, 3).double(), torch.rand(2, 3).double() + 0.5
    distance = weft.DistanceBias(weight, sigma, (2, 3), extra=1)
    dense = distance.to_dense()[0]
    assert (dense[:, 0] == 0).all() and (dense[:, :, 0] == 0).all()
    for h, i, j in itertools.product(range(2), range(6), range(6)):
        square = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
        terms = [weight[h, m] * math.exp(-square / (2 * sigma[h, m] ** 2)) for m in range(3)]
        torch.testing.assert_close(dense[h, 1 + i, 1 + j], sum(terms))
    u, low = torch.randn(2, 1, 7, 3).double(), torch.randn(1, 2, 7, 3).double()
    for bias in (relative, distance, weft.LowRankBias(u, low)):
        found = weft.attention(q, k, v, bias=bias)
        torch.testing.assert_close(found, weft.attention(q, k, v, bias=bias.to_dense()))
        capped = weft.attention(q, k, v, bias=bias, softcap=1.0)
        torch.testing.assert_close(
            capped, weft.attention(q, k, v, bias=bias.to_dense(), softcap=1.0)
        )


def test_gradients_reach_the_numbers_of_a_bias():
    q, k, v = tokens(2, 2, 5, 5, 4)(torch.float64, "cpu")
    leaf = lambda *shape: torch.rand(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    index = torch.randint(3, (5, 5))
    makers = [
        (lambda t: weft.RelativeBias(t, index), (leaf(3, 2),)),
        (lambda w, s: weft.DistanceBias(w, s + 0.5, (5,)), (leaf(2, 2), leaf(2, 2))),
        (weft.LowRankBias, (leaf(1, 2, 5, 2), leaf(2, 1, 5, 2))),
    ]
    for make, leaves in makers:
        assert torch.autograd.gradcheck(lambda *t: weft.attention(q, k, v, bias=make(*t)), leaves)  # noqa: B023


def test_parts_of_the_keys_merge_by_their_logsumexp():
    """What ring attention and split decoding rely on: lse leaves out the sink."""
    q, k, v = tokens(2, 3, 6, 20, 8)(torch.float64, "cpu")
    sink = torch.randn(3).double()
    whole, lse = weft.attention(q, k, v, sink=sink, return_lse=True)
    parts = [weft.attention(q, k[:, :, s], v[:, :, s], return_lse=True)
             for s in (slice(0, 13), slice(13, 20))]  # fmt: skip
    both = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(both, lse)
    total = torch.logaddexp(both, sink[:, None])
    merged = sum(out * (part - total).exp()[..., None] for out, part in parts)
    torch.testing.assert_close(merged, whole)


def test_key_sums_are_the_attention_received():
    q, k, v = tokens(2, 3, 6, 9, 8)(torch.float64, "cpu")
    p = torch.softmax(q @ k.mT / 8**0.5, -1)
    _, sums = weft.attention(q, k, v, return_key_sums=True)
    torch.testing.assert_close(sums, p.sum(2))
    one_hot = F.one_hot(torch.tensor([2]), 6).double().expand(2, 1, 6)
    _, of_token = weft.attention(q, k, v, return_key_sums=True, query_weight=one_hot)
    torch.testing.assert_close(of_token, p[:, :, 2])


def test_dropout_is_a_function_of_its_seed():
    q, k, v = tokens(2, 2, 40, 50, 8)(torch.float32, "cpu")
    v = torch.eye(50).expand(2, 2, 50, 50)  # the output is the matrix of weights
    run = lambda seed, p=0.3: weft.attention(q, k, v, dropout_p=p, seed=torch.tensor(seed))  # noqa: E731
    p = weft.attention(q, k, v)
    dropped = run(5)
    assert torch.equal(dropped, run(5)) and not torch.equal(dropped, run(6))
    assert not torch.equal(dropped, run(5 + (1 << 40)))  # both halves of the seed count
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], p[kept] / 0.7)
    n = kept.numel()
    assert abs(kept.float().mean() - 0.7) < 4 * (0.3 * 0.7 / n) ** 0.5
    rows = [kept[0, 0], kept[0, 1], kept[1, 0]]
    for one, two in itertools.combinations(rows, 2):  # heads and batches differ
        assert 0.4 < (one == two).float().mean() < 0.75
    torch.manual_seed(3)
    drawn = weft.attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(3)
    assert torch.equal(drawn, weft.attention(q, k, v, dropout_p=0.3))


def test_autocast_casts_what_is_multiplied():
    q, k, v = tokens(2, 2, 5, 7, 4)(torch.float32, "cpu")
    bias = torch.randn(2, 5, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = weft.attention(q, k, v, bias=bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert bias.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), plain_attention(q, k, v, bias=bias), atol=0.02, rtol=0)


def test_layout_of_results_joins_heads_without_a_copy():
    q, k, v = (t.requires_grad_() for t in tokens(2, 3, 5, 7, 4)(torch.float32, "cpu"))
    out = weft.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.autograd.grad(out.sum(), q)[0].transpose(1, 2).is_contiguous()


def test_one_graph_serves_many_shapes():
    """No recompilation for new sizes, masks' numbers and lengths."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def run(q, k, v, offset, lengths):
        mask = masks.Causal(offset) & masks.Lengths(key=lengths)
        return weft.attention(q, k, v, mask=mask, scale=0.5)

    compiled = torch.compile(run, backend=counter, dynamic=True, fullgraph=True)
    for n in range(3, 53):
        q, k, v = tokens(2, 2, n, n + 2, 4)(torch.float32, "cpu")
        compiled(q, k, v, n // 2, torch.tensor([n, n // 2]))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["mask", "bias", "key_weight"])
def test_sizes_known_to_a_compiler_meet_sizes_that_are_not(kind):
    """An operand of constant sizes beside tokens of symbolic ones."""
    torch._dynamo.reset()
    q, k, v = tokens(3, 2, 5, 7, 4)(torch.float32, "cpu")

    def run(q, k, v):
        shape = (3, 2, 7) if kind == "key_weight" else (1, 1, 5, 7)
        operand = torch.arange(7).expand(shape).contiguous()
        operand = operand < 4 if kind == "mask" else operand / 7
        return weft.attention(q, k, v, **{kind: operand})

    compiled = torch.compile(run, backend="eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))
