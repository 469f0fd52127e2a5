"""linear_cross_entropy against F.cross_entropy, and the edges that its docstring promises."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, running
from torch.nn import functional as F

import weft
from weft.ops.cases import randn
from weft.ops.pairwise import cross_entropy as op
from weft.ops.pairwise.cases.cross_entropy import plain_linear_cross_entropy


def inputs(N=23, C=17, D=11, dtype=torch.float64, ignored=True):
    x, weight, bias = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, D), (C, D), (C,)]))
    target = torch.arange(N) * 5 % C
    if ignored:
        target[::4] = -100
    return [t.requires_grad_() for t in (x, weight)] + [target, bias.requires_grad_()]


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, [t for t in leaves if t.is_floating_point()])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.3},
        {"softcap": 2.0},
        {"margin": 0.35},
        {"softcap": 2.0, "margin": -1.0, "label_smoothing": 0.1},
    ],
)
def test_is_cross_entropy_of_linear(implementation, options, reduction):
    args = inputs()
    expected = plain_linear_cross_entropy(*args, **options, reduction=reduction)
    with running(implementation):
        found = weft.linear_cross_entropy(*args, **options, reduction=reduction)
        torch.testing.assert_close(found, expected)
        upstream = torch.randn_like(expected)
        ours, theirs = (gradients((r * upstream).sum(), *args) for r in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_another_ignore_index(implementation):
    x, weight, target, bias = inputs(ignored=False)
    with running(implementation):
        found = weft.linear_cross_entropy(x, weight, target, bias, ignore_index=5)
    expected = F.cross_entropy(F.linear(x, weight, bias), target, ignore_index=5)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_average(implementation):
    """NaN with gradient 0, as in PyTorch; sums are 0."""
    x, weight, _, bias = inputs(4)
    target = torch.full((4,), -100)
    with running(implementation):
        loss = weft.linear_cross_entropy(x, weight, target, bias)
        assert loss.isnan()
        assert not any(g.any() for g in gradients(loss, x, weight, bias))
        assert weft.linear_cross_entropy(x, weight, target, reduction="sum") == 0
        assert weft.linear_cross_entropy(x[:0], weight, target[:0]).isnan()
        assert weft.linear_cross_entropy(x[:0], weight, target[:0], reduction="none").shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits(implementation, dtype):
    """Of ±1e4: neither overflow nor a difference of large numbers beyond that of the logits."""
    x, weight, target, bias = inputs(dtype=dtype)
    scale = 1e4 / float((x @ weight.mT).abs().max().detach())
    with running(implementation):
        loss = weft.linear_cross_entropy(scale * x, weight, target, bias)
        found = gradients(loss, x, weight, bias)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    truth = F.cross_entropy(F.linear(scale * wide[0], *wide[1:]), target)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=0)
    for one, two in zip(found, torch.autograd.grad(truth, wide), strict=True):
        allowed = 1e3 * tolerance * float(two.abs().max())
        torch.testing.assert_close(one.double(), two, rtol=0, atol=allowed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_classes_that_are_switched_off(implementation):
    """A bias of −∞: probability 0; a sample of such a class has an infinite loss."""
    x, weight, target, bias = inputs()
    bias = bias.detach().clone()
    bias[[2, 7]] = -torch.inf
    with running(implementation):
        found = weft.linear_cross_entropy(x, weight, target, bias, reduction="none")
        smoothed = weft.linear_cross_entropy(x, weight, target, bias, label_smoothing=0.1)
        off = (target == 2) | (target == 7)
        loss = found[~off].sum()
        grads = gradients(loss, x, weight)
    expected = F.cross_entropy(F.linear(x, weight, bias), target, reduction="none")
    torch.testing.assert_close(found, expected)
    assert found[off].isinf().all() and smoothed.isinf()
    for one, two in zip(grads, gradients(expected[~off].sum(), x, weight), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ignored_samples_are_not_read(implementation):
    x, weight, target, bias = inputs()
    with running(implementation):
        loss = weft.linear_cross_entropy(x, weight, target, bias)
        spoiled = torch.where((target < 0)[:, None], torch.nan, x)
        again = weft.linear_cross_entropy(spoiled, weight, target, bias)
        torch.testing.assert_close(again, loss)
        for one, two in zip(
            gradients(again, x, weight, bias), gradients(loss, x, weight, bias), strict=True
        ):
            torch.testing.assert_close(one, two)
        broken = weft.linear_cross_entropy(
            torch.where((target > 3)[:, None], torch.nan, x), weight, target, bias
        )
        assert broken.isnan()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_the_forward_is_that_of_the_backward(implementation):
    """Rows that fit the buffer save the gradient; those that do not compute it again."""
    args = inputs(200, 333, 40)
    with running(implementation):
        saved = gradients(weft.linear_cross_entropy(*args), *args)
        before, op.ROW_BYTES = op.ROW_BYTES, 0
        try:
            again = gradients(weft.linear_cross_entropy(*args), *args)
        finally:
            op.ROW_BYTES = before
    for one, two in zip(saved, again, strict=True):
        torch.testing.assert_close(one, two)


def test_saves_only_for_a_gradient():
    args = inputs()
    calls = []
    run = op.forward
    try:
        op.forward = lambda *a: calls.append(a[-1]) or run(*a)
        weft.linear_cross_entropy(*args)
        with torch.no_grad():
            weft.linear_cross_entropy(*args)
        weft.linear_cross_entropy(*(t.detach() for t in args))
        weft.linear_cross_entropy(*args, reduction="none")
    finally:
        op.forward = run
    assert calls == [True, False, False, False]


def test_gradient_scales_and_repeats():
    """The saved gradient serves any upstream number, and more than one backward."""
    x, weight, target, bias = inputs()
    loss = weft.linear_cross_entropy(x, weight, target, bias)
    once = torch.autograd.grad(loss, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(-3 * loss, x, retain_graph=True)[0], -3 * once)
    assert torch.equal(torch.autograd.grad(loss, x)[0], once)


def test_half_precision_has_a_float32_loss():
    for dtype in (torch.bfloat16, torch.float16):
        x, weight, target, bias = inputs(dtype=dtype)
        loss = weft.linear_cross_entropy(x, weight, target, bias)
        assert loss.dtype == torch.float32
        assert gradients(loss, x)[0].dtype == dtype


def test_autocast():
    x, weight, target, bias = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = weft.linear_cross_entropy(x, weight, target, bias)
    torch.testing.assert_close(
        loss, weft.linear_cross_entropy(x, weight, target, bias), rtol=0.02, atol=0
    )
    assert gradients(loss, x, weight)[1].dtype == torch.float32
