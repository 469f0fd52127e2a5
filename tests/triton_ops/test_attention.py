"""The Triton kernels of attention: every rule, option and plan with several tiles, NaN canaries."""

import pytest
import torch

import weft
from weft import masks
from weft.ops.cases import randn
from weft.ops.registration import INTERPRETED

common = pytest.importorskip("weft.triton_kernels.common")
launchers = pytest.importorskip("weft.triton_kernels.attention.attention")

ON_GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs TRITON_INTERPRET=1 or a GPU"),
    pytest.mark.usefixtures("interpreted"),
]


@pytest.fixture
def interpreted():
    """Small tiles, and memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    with common.tiles_at_most(16):
        yield
    torch.use_deterministic_algorithms(False)


def canary(t: torch.Tensor) -> torch.Tensor:
    """The same values, with NaN before, after and between the rows."""
    around = t.new_full([n + 2 for n in t.shape], torch.nan)
    inner = around[tuple(slice(1, n + 1) for n in t.shape)]
    return inner.copy_(t)


def tokens(B, H, Nq, Nk, D, Dv, Hkv=None, dtype=torch.float32):
    shapes = ((B, H, Nq, D), (B, Hkv or H, Nk, D), (B, Hkv or H, Nk, Dv))
    return [randn(*s, seed=n, device=DEVICE).to(dtype) for n, s in enumerate(shapes)]


def check(query, key, value, gradients=True, **options):
    """Results, and the gradients of all float tensors, against float64 and the same formula."""
    floats = {"query": query, "key": key, "value": value}
    others = {}
    for name, option in options.items():
        of_float = isinstance(option, torch.Tensor) and option.is_floating_point()
        (floats if of_float else others)[name] = option
    found = results_of("triton", {n: canary(t) for n, t in floats.items()}, others, gradients)
    exact = {name: t.double() for name, t in floats.items()}
    expected = results_of("reference", exact, others, gradients, query.dtype)
    for one, two in zip(found, expected, strict=True):
        close(one, two)


def results_of(implementation, floats, others, gradients, dtype=None):
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in floats.items()}
    with weft.use(implementation):
        results = weft.attention(**leaves, **others, return_lse=True, return_key_sums=True)
        if not gradients:
            return [*results]
        upstream = [randn(*r.shape, seed=30 + n, device=DEVICE) for n, r in enumerate(results)]
        upstream[0] = upstream[0].to(dtype or results[0].dtype)
        upstream = [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)]
        given = [*leaves.values()]
        grads = torch.autograd.grad(results, given, upstream)
    return [r.detach() for r in results] + [*grads]


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    """Within a few roundings of the largest value."""
    largest = float(torch.where(two.isfinite(), two, 0).abs().max()) if two.numel() else 0.0
    bound = 16 * torch.finfo(one.dtype).eps * max(1.0, largest)
    torch.testing.assert_close(one.double(), two, rtol=0, atol=bound, equal_nan=True)


def labels(N: int, width: int) -> torch.Tensor:
    return torch.arange(N, device=DEVICE) // width - (1 << 40)


MASKS = {
    "causal": masks.Causal(1),
    "window": masks.Window(3, 5, 2),
    "two bands": masks.Window(9, 5) & masks.Causal(3),
    "lengths": masks.Lengths(
        torch.tensor([5, 18], device=DEVICE), torch.tensor([20, 0], device=DEVICE)
    ),
    "segments": masks.Segments(labels(18, 5), labels(33, 7)),
    "or": masks.Segments(labels(18, 5), labels(33, 7)) | masks.Causal(-3),
    "all": masks.Segments(labels(18, 5), labels(33, 7))
    & masks.Window(20, 9)
    & masks.Lengths(key=torch.tensor([33, 4], device=DEVICE)),
}
GRIDS = {
    "1d": masks.Neighborhood((33,), 5, 3),
    "2d": masks.Neighborhood((5, 7), (3, 2), (1, 3)),
    "3d": masks.Neighborhood((3, 4, 3), (1, 3, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain(dtype):
    check(*tokens(1, 2, 17, 33, 10, 18, dtype=dtype))


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    check(*tokens(2, 1, 18, 33, 8, 4), name in ("window", "lengths", "all"), mask=MASKS[name])


@pytest.mark.parametrize("name", GRIDS)
def test_neighborhoods(name):
    mask = GRIDS[name]
    N = torch.Size(mask.shape).numel()
    check(*tokens(1, 1, N, N, 8, 4), name == "2d", mask=mask)


def test_packed_bits():
    """Tiles that are empty, partial and full."""
    allowed = torch.zeros(66, 130, dtype=torch.bool)
    allowed[:64, :64] = True
    allowed[60:, 70:] = randn(6, 60) > 0
    with common.tiles_at_most(64):
        check(*tokens(2, 1, 66, 130, 8, 4), mask=allowed.to(DEVICE))


def test_one_row_of_bits():
    check(*tokens(2, 1, 5, 33, 8, 4), mask=(randn(2, 1, 1, 33) > 0).to(DEVICE))


def test_programs_are_packed():
    sizes = (2, 2, 70, 70)
    ids, other = labels(70, 20), labels(70, 30)
    blocks = masks.Blocks((randn(2, 1, 7, 5) > 0).to(DEVICE), (10, 14))
    dense = masks.Dense((randn(70, 1) > 0).to(DEVICE))
    grid = masks.Neighborhood((7, 10), 3, (2, 3))
    length = masks.Lengths(key=torch.tensor([3, 65], device=DEVICE))
    for mask in (~(masks.Segments(ids, other) & grid), dense | ~length, blocks & masks.Causal(2)):
        with weft.use("reference"):
            expected = mask.plan(sizes, DEVICE)
        with weft.use("triton"):
            found = mask.plan(sizes, DEVICE)
        assert torch.equal(found.words, expected.words)
        assert torch.equal(found.states, expected.states)


@pytest.mark.parametrize("shape", [(2, 2, 17, 18), (1, 2, 1, 18), (2, 1, 17, 1), (1, 1, 1, 1)])
def test_bias(shape):
    bias = randn(*shape, device=DEVICE)
    bias[..., :1, :1] = -torch.inf if bias.numel() > 1 else 0.5
    check(*tokens(2, 2, 17, 18, 8, 4), bias=bias)


def test_options():
    key_weight = randn(2, 1, 33, seed=5, device=DEVICE).clamp_min(0)
    query_weight = randn(2, 4, 17, seed=6, device=DEVICE)
    query_weight[0] = 0
    check(
        *tokens(2, 4, 17, 33, 8, 4, Hkv=2),
        enable_gqa=True,
        sink=randn(4, seed=7, device=DEVICE),
        key_weight=key_weight,
        query_weight=query_weight,
        softcap=1.5,
        dropout_p=0.4,
        seed=torch.tensor(-123456789012345, device=DEVICE),
        mask=masks.Causal(9),
    )


def test_parts_of_the_keys(monkeypatch):
    """Few queries: three parts, of which a length leaves some empty."""
    monkeypatch.setattr(launchers, "KEYS_OF_PART", 16)
    assert launchers.parts_of(2, 90, 16) == (3, 32)
    lengths = masks.Lengths(key=torch.tensor([90, 20], device=DEVICE))
    sink = randn(1, seed=7, device=DEVICE)
    check(*tokens(2, 1, 3, 90, 8, 4), mask=lengths, sink=sink)


def test_what_nobody_sees_is_not_read():
    inputs = tokens(1, 1, 18, 33, 8, 4)
    ids = labels(18, 5).clone(), labels(33, 7).clone()
    ids[1][20:], ids[0][15:] = 7, 8
    options = {"mask": masks.Segments(*ids)}
    names = ("query", "key", "value")
    exact = {name: t.double() for name, t in zip(names, inputs, strict=True)}
    expected = results_of("reference", exact, options, True)
    query, key, value = inputs
    key[..., 20:, :], value[..., 20:, :], query[..., 15:, :] = torch.nan, torch.inf, torch.nan
    found = results_of("triton", dict(zip(names, inputs, strict=True)), options, True)
    for one, two in zip(found, expected, strict=True):
        close(one, two)


@pytest.mark.parametrize("shape", [(1, 1, 0, 3), (1, 1, 3, 0), (0, 2, 3, 3)])
def test_empty(shape):
    check(*tokens(*shape, 4, 4))
