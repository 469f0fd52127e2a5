"""The C++ iterations against the formula's: the same iterates in every form of computing them."""

import math

import pytest
import torch

import weft
from weft import native
from weft.ops.transport.sinkhorn import forward

INF = math.inf
LEVELS = [level for level in native.supported_levels() if level in ("generic", native.cpu_level)]
pytestmark = pytest.mark.skipif("cpu" in native.missing, reason="no native build")


def inputs(B, N, M, *, dtype=torch.float32, border=False, epsilon=0.1, zeros=False, seed=0):
    """The tensors of a balanced problem, in the order of the schema, mask and lengths None."""
    rand = lambda *shape: torch.rand(  # noqa: E731
        *shape, generator=generator, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(seed)
    cost, a, b = rand(B, N, M), rand(B, N + border) + 0.1, rand(B, M + border) + 0.1
    if zeros:
        a[:, ::3] = b[:, 1::4] = 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    side = rand(B, 3).to(wide) if border else None
    eps = torch.full((B,), epsilon, dtype=wide)
    return [cost.to(dtype), a.to(wide), b.to(wide), eps, None, None, None, side, False]


def solve(
    tensors,
    *,
    mask=None,
    rows=None,
    columns=None,
    similarity=False,
    start=None,
    rho=(INF, INF),
    iterations=30,
    tolerance=-1.0,
    relax=False,
    using="cpu",
):
    args = [*tensors[:4], mask, rows, columns, tensors[7], similarity]
    with weft.use(using):
        return forward(*args, start, *rho, iterations, tolerance, relax, False)


def double(value):
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def compare(tensors, tolerance_in_eps, **options):
    """f, g, the error and iterations of the kernel against those of the formula in float64."""
    found = solve(tensors, **options)
    true = solve(
        [double(t) for t in tensors],
        using="reference",
        **{name: double(value) for name, value in options.items()},
    )
    for mine, other in zip(found[:2], true[:2], strict=True):
        apart = (mine.double() - other) / double(tensors[3])[:, None]
        apart = torch.where(mine.double() == other, 0, apart)
        assert (apart.abs() < tolerance_in_eps).all()
    exact = tensors[0].dtype == torch.float64
    torch.testing.assert_close(
        found[2].double(), true[2], rtol=1e-6 if exact else 1e-3, atol=1e-9 if exact else 2e-6
    )
    if exact:
        assert torch.equal(found[3], true[3])
    return found


CHECKS = {torch.float64: 1e-8, torch.float32: 2e-4, torch.bfloat16: 2e-4, torch.float16: 2e-4}
OPTIONS = {
    "plain": {},
    "first": {"iterations": 1},
    "similarity": {"similarity": True},
    "unbalanced": {"rho": (1.0, 0.5)},
    "semi_relaxed": {"rho": (INF, 0.3)},
    "other_side": {"rho": (0.05, INF)},
    "tolerance": {"tolerance": 1e-4, "iterations": 200},
    "relaxed": {"tolerance": 1e-4, "iterations": 200, "relax": True},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """What the formula computes here is too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request):
    with native.use_level(request.param):
        yield request.param


@pytest.mark.parametrize("name", OPTIONS)
def test_iterates_are_those_of_the_formula(level, name):
    for dtype in CHECKS if name == "similarity" else (torch.float64, torch.float32):
        iterates_are_those_of_the_formula(name, dtype)


def iterates_are_those_of_the_formula(name, dtype):
    for border, shape in ((False, (2, 17, 35)), (True, (2, 9, 16)), (False, (1, 40, 3))):
        compare(inputs(*shape, dtype=dtype, border=border), CHECKS[dtype], **OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plain", "unbalanced", "relaxed"])
def test_what_does_not_exist(level, name, dtype):
    """Masks, lengths and weights of 0: also columns that nothing reaches, and rows that reach
    nothing, whose potential is −∞ and whose weight is in the error."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 12, 20, generator=generator) < 0.7
    options = OPTIONS[name] | {"iterations": 25, "relax": False}
    check = CHECKS[dtype]
    compare(inputs(3, 12, 20, dtype=dtype, zeros=True), check, **options)
    mask[1, 2] = mask[2, :, 4] = False
    compare(inputs(3, 12, 20, dtype=dtype), check, mask=mask, **options)
    lengths = {"rows": torch.tensor([12, 5, 0]), "columns": torch.tensor([3, 20, 7])}
    tensors = inputs(3, 12, 20, dtype=dtype, border=True, zeros=True)
    compare(tensors, check, mask=mask, **lengths, **options)
    holes = inputs(3, 12, 20, dtype=dtype)
    holes[0].masked_fill_(~mask, INF)
    compare(holes, check, **options)
    for shape in ((2, 0, 3), (2, 3, 0), (0, 3, 3), (2, 1, 1)):
        compare(inputs(*shape, dtype=dtype), check, **options)


@pytest.mark.parametrize("name", ["plain", "unbalanced", "semi_relaxed"])
def test_start_strides_and_different_epsilons(name):
    tensors = inputs(3, 14, 18, dtype=torch.float64)
    tensors[3] = torch.tensor([0.02, 0.1, 1.0], dtype=torch.float64)
    start = inputs(3, 18, 1, dtype=torch.float64, seed=5)[0][..., 0]
    expected = compare(tensors, 1e-8, start=start, **OPTIONS[name])
    tensors[0] = tensors[0].mT.contiguous().mT
    wide = torch.stack([tensors[1], tensors[1]], 2)
    tensors[1] = wide[..., 0]
    found = solve(tensors, start=start.mT.contiguous().mT, **OPTIONS[name])
    assert all(map(torch.equal, found, expected))
    first = [t[:1] if isinstance(t, torch.Tensor) else t for t in tensors]
    many = [t.expand(3, *t.shape[1:]) if isinstance(t, torch.Tensor) else t for t in first]
    alone, together = solve(first, **OPTIONS[name]), solve(many, **OPTIONS[name])
    assert all(torch.equal(x.expand_as(y), y) for x, y in zip(alone, together, strict=True))


@pytest.mark.parametrize("epsilon", [1e-2, 3e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_epsilon(level, dtype, epsilon):
    """Exponents of hundreds and thousands, where sums of plain exponentials are 0."""
    tensors = inputs(1, 60, 70, dtype=dtype, epsilon=epsilon)
    check = CHECKS[dtype] if dtype == torch.float64 else 6e-8 / epsilon * 4
    for name in ("plain", "unbalanced", "first"):
        compare(tensors, max(check, 1e-7), **OPTIONS[name])


def test_far_points_of_an_unbalanced_problem():
    """Costs of hundreds of ε: the translation takes them up."""
    tensors = inputs(2, 20, 30, dtype=torch.float64, epsilon=0.05)
    tensors[0] += 30
    compare(tensors, 1e-7, rho=(5.0, 3.0), iterations=40)


@pytest.mark.parametrize("shape", [(5, 7), (40, 33), (380, 400)])
@pytest.mark.parametrize("border", [False, True])
def test_padding_changes_no_bit(shape, border):
    N, M = shape
    tensors = inputs(1, N, M, border=border)
    padded = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    padded[0] = torch.nn.functional.pad(padded[0], (0, 21, 0, 13), value=math.nan)
    for n, more in ((1, 13), (2, 21)):
        last = tensors[n][:, -1:] if border else tensors[n][:, :0]
        inside = tensors[n][:, :-1] if border else tensors[n]
        padded[n] = torch.cat([inside, inside.new_full((1, more), 0.3), last], 1)
    alone = solve(tensors, iterations=5)
    inside = solve(padded, rows=torch.tensor([N]), columns=torch.tensor([M]), iterations=5)
    for n, count in ((0, N), (1, M)):
        real = inside[n][:, :count]
        if border:
            real = torch.cat([real, inside[n][:, -1:]], 1)
        assert torch.equal(real, alone[n])
    assert torch.equal(inside[2], alone[2])


@pytest.mark.parametrize("shape", [(1, 400, 500), (3, 420, 400), (9, 30, 40)])
def test_threads_change_no_bit(shape):
    tensors, before = inputs(*shape, epsilon=0.02), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(solve(tensors, iterations=6))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_large_matrices_are_computed_in_parts():
    compare(inputs(1, 500, 700, epsilon=0.02), CHECKS[torch.float32], iterations=4)
    mask = torch.rand(1, 500, 700, generator=torch.Generator().manual_seed(0)) < 0.5
    options = OPTIONS["unbalanced"] | {"iterations": 4}
    compare(inputs(1, 500, 700, dtype=torch.float64, border=True), 1e-8, mask=mask, **options)


def test_nan_spreads_and_ends():
    tensors = inputs(2, 9, 20)
    tensors[0][0, 3, 4] = math.nan
    f, g, error, iterations = solve(tensors, tolerance=1e-3, iterations=30)
    assert f[0].isnan().all() and g[0].isnan().all() and error[0].isnan() and iterations[0] == 30
    assert f[1].isfinite().all() and g[1].isfinite().all() and iterations[1] < 30


# ⟨P, C⟩ of 512 uniform points in the plane from 512 others, squared distances.
OPTIMA = {1e-1: 0.078950, 1e-2: 0.0115034, 1e-3: 0.0039509}


@pytest.mark.parametrize("epsilon", OPTIMA)
def test_accuracy_in_float32(epsilon):
    import numpy as np

    random = np.random.RandomState(0)
    x, y = (torch.from_numpy(random.rand(512, 2)) for _ in range(2))
    cost = torch.cdist(x, y).square()
    tensors = inputs(1, 512, 512, epsilon=epsilon)
    tensors[0] = cost.float()[None]
    tensors[1] = tensors[2] = torch.full((1, 512), 1 / 512)
    f, g, _, _ = (t.double() for t in solve(tensors, tolerance=1e-6, iterations=1000, relax=True))
    exponent = (f[0][:, None] + g[0] - tensors[0][0].double()) / epsilon
    P = exponent.exp() / 512**2
    assert (P.sum(1) - 1 / 512).abs().sum() <= 1e-5
    assert (P.sum(0) - 1 / 512).abs().sum() <= 1e-5
    assert float((P * cost).sum()) == pytest.approx(OPTIMA[epsilon], rel=2e-5)
    exact = [double(t) for t in tensors]
    exact[0] = cost[None]
    f, g, _, _ = solve(exact, tolerance=1e-9, iterations=2000, relax=True)
    truth = ((f[0][:, None] + g[0] - cost) / epsilon).exp() / 512**2
    assert (P - truth).abs().max() <= 1e-6
