"""The Triton kernels of the dense reductions: every plan, several tiles, parts and blocks."""

import pytest
import torch

from weft.ops.cases import randn
from weft.ops.registration import INTERPRETED
from weft.reference.pairwise import distance, masks
from weft.reference.pairwise import pairwise as reference
from weft.reference.pairwise.pairs import Pair

common = pytest.importorskip("weft.triton_kernels.common")
kernels = pytest.importorskip("weft.triton_kernels.pairwise.dense")
of_matrix = pytest.importorskip("weft.triton_kernels.pairwise.distance")
of_sums = pytest.importorskip("weft.triton_kernels.pairwise.pairwise")

ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.usefixtures("interpreted"),
]
PAIRS = {
    "dot": Pair("dot", scale=0.25),
    "sqeuclidean": Pair("sqeuclidean"),
    "euclidean": Pair("sqeuclidean", "root"),
    "rbf": Pair("sqeuclidean", "exp", scale=0.1),
    "log": Pair("sqeuclidean", "log_ratio", parameter=1e-4),
    "arcosh": Pair("sqeuclidean", "arcosh", scale=0.5, parameter=2.0),
    "l1": Pair("l1"),
}
NO_MASK = (None, None, None, True, False)
ALL = 31


@pytest.fixture
def interpreted():
    """Small tiles, and memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    with common.tiles_at_most(16):
        yield
    torch.use_deterministic_algorithms(False)


def points(N, M, D, dtype=torch.float32, offset=0.0):
    x, y = randn(N, D, dtype=torch.float64), randn(M, D, dtype=torch.float64, seed=1)
    return (x + offset).to(DEVICE, dtype), (y + offset).to(DEVICE, dtype)


def close(found, expected, dtype):
    """Within a few roundings of the largest value."""
    assert found.is_contiguous() and found.shape == expected.shape
    finite = torch.where(expected.isfinite(), expected, 0).double()
    bound = (
        64 * torch.finfo(dtype).eps * max(1.0, float(finite.abs().max())) if finite.numel() else 0
    )
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=bound, equal_nan=True
    )


def check(x, y, pair, plan, factors=(None, None, None), mask=NO_MASK, E=None):
    """The matrix, sums and log-sum-exps with all their gradients, against float64."""
    N, M, dtype = x.shape[0], y.shape[0], x.dtype
    of_pair = (pair.base, pair.function, pair.scale, pair.shift, pair.parameter)
    args = (x, y, *factors, *of_pair)
    wide = lambda t: None if t is None else t.double()  # noqa: E731
    exact = (wide(x), wide(y), *map(wide, factors), pair)
    allowed = masks.allowed_pairs(N, M, x.device, *mask)
    values = None if E is None else randn(M, E, device=DEVICE, seed=4)
    grad = randn(N, *(() if E is None else (E,)), device=DEVICE, seed=5)
    found = [of_sums.pairwise_sum(*args, *mask, values, plan)]
    expected = [reference.pairwise_sum(*exact, allowed, wide(values))]
    found += of_sums.pairwise_sum_backward(grad, *args, *mask, values, ALL, plan)
    expected += reference.pairwise_sum_backward(wide(grad), *exact, allowed, wide(values))
    if E is None:
        out = of_sums.pairwise_logsumexp(*args, *mask, plan)
        truth = reference.pairwise_logsumexp(*exact, allowed)
        found += [out, *of_sums.pairwise_logsumexp_backward(grad, out, *args, *mask, ALL, plan)]
        expected += [truth]
        expected += reference.pairwise_logsumexp_backward(wide(grad), truth, *exact, allowed)
    if E is None and mask == NO_MASK:
        grad = randn(N, M, dtype=dtype, device=DEVICE, seed=6)
        found += [of_matrix.pairwise_matrix(*args, plan)]
        found += of_matrix.pairwise_matrix_backward(grad, *args, ALL, plan)
        expected += [distance.pairwise_matrix(*exact)]
        expected += distance.pairwise_matrix_backward(wide(grad), *exact)
    for one, two in zip(found, expected, strict=True):
        if two is None:
            assert one.numel() == 0
        else:
            close(one, two, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["direct", "fused", "chunked"])
@pytest.mark.parametrize("base", ["dot", "sqeuclidean"])
def test_plans(base, plan, dtype):
    check(*points(17, 18, 18, dtype), PAIRS[base], plan)


@pytest.mark.parametrize("plan", ["direct", "chunked"])
@pytest.mark.parametrize("name", PAIRS)
def test_functions(name, plan):
    check(*points(5, 17, 10), PAIRS[name], plan)


def factors_of(N, M):
    make = lambda n, seed: torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.5  # noqa: E731
    return make(N, 7).to(DEVICE), make(M, 8).to(DEVICE), make(M, 9).to(DEVICE)


@pytest.mark.parametrize("plan", ["direct", "fused", "chunked"])
def test_factors_and_bias(plan):
    check(*points(18, 17, 10), PAIRS["arcosh"], plan, factors_of(18, 17))


def masks_of(N, M):
    bits = torch.rand(M, N, generator=torch.Generator().manual_seed(3)).to(DEVICE).T > 0.4
    bits[2] = False
    labels = [torch.arange(n, device=DEVICE) % 3 for n in (N, M)]
    return {
        "bits": (bits, None, None, True, False),
        "same": (None, *labels, True, False),
        "different": (None, *labels, False, True),
    }


@pytest.mark.parametrize("kind", ["bits", "same", "different"])
@pytest.mark.parametrize("plan", ["direct", "fused", "chunked"])
def test_masks(plan, kind):
    check(*points(18, 17, 10), PAIRS["rbf"], plan, mask=masks_of(18, 17)[kind])


@pytest.mark.parametrize("plan", ["direct", "fused", "chunked"])
@pytest.mark.parametrize("base", ["dot", "euclidean", "l1"])
def test_what_is_masked_is_not_read(plan, base):
    """Rows of NaN and infinities that no pair may see, one pair that sees a NaN."""
    x, y = points(6, 20, 10)
    allowed = torch.ones(6, 20, dtype=torch.bool, device=DEVICE)
    y[3], y[4, 2], x[5] = torch.nan, torch.inf, torch.nan
    allowed[:, 3:5] = False
    allowed[5] = False
    plan = "direct" if base == "l1" else plan
    check(x, y, PAIRS[base], plan, mask=(allowed, *NO_MASK[1:]))


@pytest.mark.parametrize("E", [1, 18])
def test_values(E):
    check(*points(5, 33, 10), PAIRS["rbf"], "direct", E=E)
    check(*points(5, 33, 10), PAIRS["rbf"], "chunked", E=E, mask=masks_of(5, 33)["bits"])


@pytest.mark.parametrize("plan", ["direct", "fused", "chunked"])
def test_parts_and_blocks(plan, monkeypatch):
    """Three rows and 200 columns in parts; blocks of 3 x 14 products."""
    monkeypatch.setattr(kernels, "BUFFER_BYTES", 4 * 3 * 14)
    assert kernels.parts_of(1, 200, 16)[1] > 1
    check(*points(3, 60, 12), PAIRS["rbf"], plan)
    monkeypatch.setattr(kernels, "MOST_ROWS", 2)
    check(*points(3, 40, 12), PAIRS["dot"], plan)


@pytest.mark.parametrize("plan", ["direct", "fused", "chunked"])
def test_far_from_the_origin(plan):
    check(*points(5, 17, 12, offset=1000.0), PAIRS["euclidean"], plan)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1)])
def test_empty(shape):
    check(*points(*shape), PAIRS["dot"], "auto")


def test_only_what_is_wanted():
    x, y = points(3, 5, 10)
    args = (x, y, None, None, None, "dot", "identity", 1.0, 0.0, 0.0, *NO_MASK, None)
    sizes = [g.numel() for g in of_sums.pairwise_sum_backward(x[:, 0], *args, 2, "chunked")]
    assert sizes == [0, y.numel(), 0, 0, 0]
