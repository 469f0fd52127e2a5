"""The C++ forward of attention against the reference in float64, on every path of the kernel."""

import pytest
import torch

import weft
from weft import masks, native
from weft.ops.attention.attention import forward
from weft.ops.attention.inputs import arguments_of
from weft.ops.attention.mask_plan import kernel_program
from weft.reference.attention.attention import Inputs
from weft.reference.attention.attention import attention as formula

pytestmark = pytest.mark.skipif("cpu" in native.missing, reason="without the native library")

# In half precision the weights are rounded for the second product, as those of PyTorch are; in
# float64 the oracle has errors of its own.
ULPS = {torch.float64: 16, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def compare(query, key, value, *, mask=None, sums=False, **options):
    """(out, lse, sums) of the kernel, compared with the formula in float64 and in the dtype."""
    B, H, Nq, _ = query.shape
    program = kernel_program(masks.Dense(mask) if isinstance(mask, torch.Tensor) else mask,
                             (B, H, Nq, key.shape[2]), query, packed=True)  # fmt: skip
    x = Inputs(query, key, value, mask=program, **options)
    with weft.use("cpu"):
        result = forward(*arguments_of(x), sums)[:3]
    fields = {name: wide(getattr(x, name)) for name in x.__dataclass_fields__}
    if x.bias is not None:
        hidden = x.bias <= torch.finfo(x.bias.dtype).min / 2
        fields["bias"] = fields["bias"].masked_fill(hidden, -torch.inf)
    truth = formula(Inputs(**fields), sums)[:3]
    plain = formula(x, sums)[:3]
    ulp = torch.finfo(query.dtype).eps
    for got, want, usual in zip(result, truth, plain, strict=True):
        assert got.shape == want.shape and got.isnan().equal(want.isnan())
        assert (got == -torch.inf).equal(want == -torch.inf)
        finite = want.isfinite()
        if not finite.any():
            continue
        # The largest of a few hundred errors is a matter of luck: 2 times is meant on the whole.
        error, usual = ((t.double() - want)[finite] for t in (got, usual))
        rounding = float(ulp * want[finite].abs().max() * ULPS[query.dtype])
        mean = lambda t: float(t.square().mean().sqrt())  # noqa: E731
        assert mean(error) <= max(2 * mean(usual), rounding / 4)
        assert float(error.abs().max()) <= max(3 * float(usual.abs().max()), rounding)
    return result


def draw(B, H, Hkv, Nq, Nk, D, Dv, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv))
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def options_of(name, B, H, Nq, Nk, dtype, seed=1):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(s, generator=g).to(dtype)  # noqa: E731
    uniform = lambda *s: torch.rand(s, generator=g)  # noqa: E731
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "plain": {},
        "scale": {"scale": -0.3},
        "softcap": {"softcap": 1.5, "scale": 0.7},
        "bias": {"bias": normal(1, H, Nq, Nk)},
        "own bias": {"bias": normal(B, H, Nq, Nk).transpose(2, 3).contiguous().transpose(2, 3)},
        "wide bias": {"bias": normal(B, 1, Nq, Nk).to(sums)},
        "key bias": {"bias": normal(B, 1, 1, Nk)},
        "query bias": {"bias": normal(1, H, Nq, 1)},
        "sink": {"sink": normal(H).to(sums) * 3},
        "weight": {"key_weight": (uniform(B, H, Nk) * (uniform(B, H, Nk) > 0.3)).to(sums)},
        "dropout": {"dropout_p": 0.3, "seed": torch.tensor(1 << 40 | 7)},
        "mask": {"mask": uniform(B, 1, Nq, Nk) > 0.6},
        "causal": {"mask": masks.Causal()},
        "lengths": {"mask": masks.Lengths(key=torch.arange(B) * Nk // max(B, 1))},
        "sums": {"sums": True},
        "weighted sums": {"sums": True, "query_weight": uniform(B, 1, Nq).to(sums)},
        "all": {
            "mask": uniform(B, H, Nq, Nk) > 0.5,
            "bias": normal(1, H, Nq, Nk),
            "softcap": 4.0,
            "sink": normal(H).to(sums),
            "key_weight": uniform(B, 1, Nk).to(sums),
            "query_weight": uniform(B, H, Nq).to(sums),
            "dropout_p": 0.2,
            "seed": torch.tensor(5),
            "sums": True,
        },
    }[name]


OPTIONS = ("plain", "scale", "softcap", "bias", "own bias", "wide bias", "key bias", "query bias",
           "sink", "weight", "dropout", "mask", "causal", "lengths", "sums", "weighted sums",
           "all")  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    B, H, Nq, Nk = 2, 2, 77, 150
    q, k, v = draw(B, H, 2, Nq, Nk, 24, 40, dtype)
    compare(q, k, v, **options_of(name, B, H, Nq, Nk, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length(dtype):
    for n in [*range(1, 36), 47, 49, 63, 64, 65, 96, 127, 128, 129, 130]:
        m = (n * 37) % 131
        q, k, v = draw(3, 2, 2, n, m, 1 + n % 19, 1 + n % 33, dtype, seed=n)
        scale = q.shape[3] ** -0.5
        compare(q, k, v, sums=True, scale=scale)
        compare(q, k, v, mask=torch.rand(3, 2, n, m) > 0.5, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    q, k, v = draw(2, 3, 3, 70, 90, 32, 32, dtype)
    qkv = torch.randn(2, 90, 3, 3, 32).to(dtype).permute(2, 0, 3, 1, 4)
    compare(qkv[0][:, :, :70], *qkv[1:])
    turned = [t.mT.contiguous().mT for t in (q, k, v)]
    compare(*turned, mask=masks.Causal(3))
    compare(q, k[:, :, :1].expand(-1, -1, 90, -1), v)
    compare(q, k, v[..., :1].expand(-1, -1, -1, 7))
    compare(q, k, v[:, :1].expand(-1, 3, -1, -1))
    compare(q[..., ::2], k[..., ::2], v[:, :, ::1, ::3])
    compare(q, k.flip(2)[:, :, ::2], v[:, :, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_key_heads(dtype):
    for Nq in (1, 33, 70):
        q, k, v = draw(2, 6, 2, Nq, 140, 16, 16, dtype)
        compare(q, k, v, sums=True, mask=torch.rand(2, 6, Nq, 140) > 0.4)


def test_empty_dimensions():
    for shape in ((0, 2, 2, 3, 4, 8, 8), (1, 2, 2, 0, 4, 8, 8), (1, 2, 2, 3, 0, 8, 8),
                  (2, 0, 0, 3, 4, 8, 8), (1, 2, 2, 3, 4, 8, 0), (1, 2, 2, 3, 5, 0, 4)):  # fmt: skip
        for dtype in DTYPES:
            compare(*draw(*shape, dtype), sums=True, mask=masks.Causal())


def test_rows_that_see_nothing():
    q, k, v = draw(2, 2, 2, 130, 200, 16, 16)
    mask = torch.rand(2, 2, 130, 200) > 0.3
    mask[:, :, 3] = False
    mask[0, 1, 64:] = False
    out, lse, _ = compare(q, k, v, mask=mask, sink=torch.tensor([0.0, 1.0]))
    assert (out[:, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    assert (out[0, 64:, 1] == 0).all()
    hidden = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert compare(q, k, v, bias=hidden)[1].isneginf().equal(lse.isneginf())
    weight = torch.zeros(2, 1, 200)
    out, lse, _ = compare(q, k, v, key_weight=weight)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_do_not_leak(dtype, bad):
    q, k, v = draw(1, 4, 2, 70, 200, 32, 32, dtype)
    mask = torch.rand(1, 4, 70, 200) > 0.5
    mask[..., [3, 40, 130, 199]] = False
    want = compare(q, k, v, mask=mask)[0]
    k[:, :, [3, 40, 130, 199]] = bad
    v[:, :, [3, 40, 130, 199]] = bad
    assert compare(q, k, v, mask=mask)[0].equal(want)
    q[:, :, 5] = bad
    mask[:, :, 5] = False
    out = compare(q, k, v, mask=mask)[0]
    assert out.isfinite().all()
    v[0, 0, 7] = float("nan")
    with weft.use("cpu"):
        out = weft.attention(q, k, v, mask=mask, enable_gqa=True)
    assert out[0, :2][mask[0, :2, :, 7]].isnan().all() and out[0, 2:].isfinite().all()


def test_scores_far_apart():
    q, k, v = draw(1, 1, 1, 20, 300, 8, 8)
    compare(100 * q, k, v)
    compare(q, k, v, bias=torch.randn(1, 1, 20, 300) * 1000)
    compare(q, k, v, sink=torch.tensor([500.0]))
    compare(q, k, v, sink=torch.tensor([-torch.inf]))
    out, lse, _ = compare(q, k, v, bias=torch.full((1, 1, 1, 300), -2e30))
    assert lse.isfinite().all()


def test_more_keys_than_16_bits():
    q, k, v = draw(1, 1, 1, 3, 65537, 8, 8)
    mask = torch.zeros(1, 1, 3, 65537, dtype=torch.bool)
    mask[..., ::1000] = True
    mask[..., -1] = True
    compare(q, k, v, mask=mask, sums=True)
    compare(q, k, v, mask=masks.Window(10, 10, offset=65530))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    q, k, v = draw(1, 4, 2, 333, 400, 16, 24, dtype)
    mask = torch.rand(1, 4, 333, 400) > 0.6
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for m in (None, mask):
                results.append(compare(q, k, v, mask=m, sums=True))
    finally:
        torch.set_num_threads(before)
    for m in (0, 1):
        for other in results[2 + m :: 2]:
            assert all(a.equal(b) for a, b in zip(results[m], other, strict=True))
