"""The C++ micro-kernels (csrc/common), each against float64, at every level the processor runs."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from weft import native

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LEVELS = native.supported_levels()


@pytest.fixture(params=LEVELS)
def op(request):
    """``op(name)`` is a micro-kernel of one instruction-set level."""
    with native.use_level(request.param):
        yield lambda name: native.cpu_op(f"microkernel_{name}")


def embedded(rows, cols, dtype, layout, fill):
    """A (rows, cols) view of random numbers inside a larger buffer full of ``fill``."""
    shape = (cols, rows) if layout == "columns" else (rows, cols)
    step = 3 if layout == "strided" else 1
    buffer = torch.full((shape[0] + 2, step * shape[1] + 5), fill, dtype=dtype)
    view = buffer[1:-1, 2 : 2 + step * shape[1] : step]
    view.copy_(torch.randn(shape, dtype=F64).clamp(-3, 3).to(dtype))
    return view.T if layout == "columns" else view


def canaries(rows, cols, dtype, margin=3):
    """A (rows, cols) view to write to, and a function: is all around it untouched?"""
    buffer = torch.full((rows + 2, cols + 2 * margin), 7.0, dtype=dtype)
    view = buffer[1:-1, margin:-margin]

    def untouched():
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[1:-1, margin:-margin] = False
        return bool((buffer[outside] == 7).all())

    return view, untouched


def product_error(c, a, b, start):
    """The largest error of c = start + a b, in units of sum |a| |b|."""
    a, b = a.double(), b.double()
    size = a.abs() @ b.abs() + abs(start)
    return float(
        ((c.double() - start - a @ b).abs() / size.clamp_min(1e-300)).nan_to_num(nan=math.inf).max()
    )


PRODUCT_TYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (F32, BF16), (F32, F16)]
SHAPES = [
    (1, 1, 1),
    (1, 33, 17),
    (13, 31, 29),
    (14, 32, 16),
    (16, 32, 32),
    (37, 257, 67),
    (64, 96, 64),
]


def tolerance(a, b, depth):
    if (a, b) == (F32, BF16):
        return 2**-8  # AMX and AVX512_BF16 round the float operand
    return max(8, depth**0.5) * (2**-53 if b == F64 else 2**-24)


@pytest.mark.parametrize("dtypes", PRODUCT_TYPES, ids=str)
def test_gemm(op, dtypes):
    gemm = op("gemm")
    layouts = ["rows", "columns", "strided"]
    for (m, n, k), left, right in itertools.product(SHAPES, layouts, layouts):
        # What surrounds the operands is NaN: a read outside them would show.
        a, b = embedded(m, k, dtypes[0], left, math.nan), embedded(k, n, dtypes[1], right, math.nan)
        for packed, accumulate in [((0, 0), 0), ((0, 1), 1), ((1, 0), 0), ((1, 1), 1)]:
            c, untouched = canaries(m, n, F64 if dtypes[1] == F64 else F32)
            gemm(a, b, c, bool(accumulate), bool(packed[0]), bool(packed[1]), 1)
            case = (m, n, k, left, right, packed)
            assert product_error(c, a, b, 7.0 * accumulate) < tolerance(*dtypes, k), case
            assert untouched(), case


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_gemm_in_several_cache_blocks(op, dtype):
    """More rows, columns and k than one block holds, with ragged ends."""
    for m, n, k in [(300, 70, 2100), (13, 2085, 40), (530, 33, 1050)]:
        for packed in (False, True):
            a, b = embedded(m, k, dtype, "rows", 0.0), embedded(k, n, dtype, "columns", 0.0)
            c, untouched = canaries(m, n, F64 if dtype == F64 else F32)
            op("gemm")(a, b, c, False, packed, packed, 1)
            assert product_error(c, a, b, 0.0) < tolerance(dtype, dtype, k)
            assert untouched()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_gemm_of_nothing(op, dtype):
    a, b = torch.ones(5, 0, dtype=dtype), torch.ones(0, 37, dtype=dtype)
    for accumulate, expected in [(False, 0.0), (True, 7.0)]:
        c = torch.full((5, 37), 7.0, dtype=F64 if dtype == F64 else F32)
        op("gemm")(a, b, c, accumulate, False, False, 1)
        assert (c == expected).all()
    empty = torch.ones(0, 37, dtype=F64 if dtype == F64 else F32)
    op("gemm")(
        torch.ones(0, 4, dtype=dtype), torch.ones(4, 37, dtype=dtype), empty, False, False, False, 1
    )


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_gemm_propagates_nan_to_its_row_and_column_only(op, dtype):
    a, b = torch.ones(35, 40, dtype=dtype), torch.ones(40, 70, dtype=dtype)
    a[33, 39] = math.nan
    b[0, 65] = math.nan
    c = torch.zeros(35, 70, dtype=F64 if dtype == F64 else F32)
    op("gemm")(a, b, c, False, False, False, 1)
    expected = torch.zeros(35, 70, dtype=torch.bool)
    expected[33] = expected[:, 65] = True
    assert torch.equal(c.isnan(), expected)
    assert (c[~expected] == 40).all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_gemm_does_not_depend_on_how_it_is_cut(op, dtype):
    a, b = embedded(150, 1300, dtype, "rows", 0.0), embedded(1300, 200, dtype, "columns", 0.0)
    whole = torch.zeros(150, 200, dtype=F64 if dtype == F64 else F32)
    op("gemm")(a, b, whole, False, False, False, 1)
    for rows, cols in [(32, 64), (17, 200), (150, 33)]:
        for packed in (False, True):
            parts = torch.zeros_like(whole)
            for i, j in itertools.product(range(0, 150, rows), range(0, 200, cols)):
                out = parts[i : i + rows, j : j + cols]
                op("gemm")(a[i : i + rows], b[:, j : j + cols], out, False, packed, packed, 1)
            assert torch.equal(parts, whole)


def every_float(step):
    """Floats of every exponent and sign, with the special ones."""
    bits = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32)
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 88.72, 88.73, -87.34, -104.0]
    )
    return torch.cat([bits.view(F32), special])


def ulps(found, truth):
    """The largest error in units in the last place of float32; special values must agree."""
    rounded = truth.to(F32)
    special = ~rounded.isfinite()
    assert torch.equal(found[special].nan_to_num(nan=1e30), rounded[special].nan_to_num(nan=1e30))
    found, truth = found[~special].double(), truth[~special]
    exponent = torch.frexp(truth.to(F32).double())[1].clamp_min(-125)
    return float(((found - truth).abs() / torch.ldexp(torch.ones_like(truth), exponent - 24)).max())


@pytest.mark.parametrize("name", ["exp", "log", "tanh"])
def test_elementary_functions(op, name):
    x = every_float(4999)
    assert ulps(op(name)(x), getattr(torch, name)(x.double())) <= 2
    double = torch.randn(37, dtype=F64).abs()
    torch.testing.assert_close(
        op(name)(double), getattr(torch, name)(double), rtol=1e-15, atol=1e-15
    )


def test_exp_or_zero(op):
    x = every_float(4999)
    x = x[~(x > 88)]
    truth = x.double().exp()
    found = op("exp_or_zero")(x)
    denormal = truth < torch.finfo(F32).tiny
    assert (found[denormal].abs() <= torch.finfo(F32).tiny).all()
    assert (found[x < -87.4] == 0).all()
    assert ulps(found[~denormal], truth[~denormal]) <= 2


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_reductions(op, dtype):
    eps = 2**-52 if dtype == F64 else 2**-23
    for n in [0, 1, 3, 16, 61, 127, 4096, 10007]:
        x, y = torch.randn(n, dtype=F64).to(dtype), torch.randn(n, dtype=F64).to(dtype)
        dx, dy = x.double(), y.double()
        bound = 16 * eps
        assert abs(op("sum")(x) - dx.sum()) <= bound * dx.abs().sum()
        assert abs(op("sum_of_squares")(x) - dx.square().sum()) <= bound * dx.square().sum()
        assert abs(op("dot")(x, y) - dx @ dy) <= bound * (dx.abs() @ dy.abs())
        assert op("max")(x) == (float(x.max()) if n else -math.inf)
        if n:
            x[n // 2] = math.nan
            assert all(math.isnan(op(name)(x)) for name in ["sum", "sum_of_squares", "max"])


def test_conversions(op):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = torch.cat(
        [every_float(49999), torch.tensor([1.00390625, 1.01171875, 65519.9, 65520.0, 3e-8, 2.9e-8])]
    )
    for half in (BF16, F16):
        out = torch.empty(x.numel(), dtype=half)
        op("convert")(x, out)
        expected = x.to(half)
        assert torch.equal(out.isnan(), x.isnan())
        assert torch.equal(
            out[~x.isnan()].view(torch.int16), expected[~x.isnan()].view(torch.int16)
        )
        back = torch.empty(bits.numel(), dtype=F32)
        op("convert")(bits.view(half), back)
        torch.testing.assert_close(back, bits.view(half).float(), rtol=0, atol=0, equal_nan=True)


def test_transpose(op):
    for dtype, rows, cols in itertools.product([F32, F64], [1, 5, 16, 37], [1, 7, 16, 49]):
        x = embedded(rows, cols, dtype, "rows", math.nan)
        y, untouched = canaries(cols, rows, dtype)
        op("transpose")(x, y)
        assert torch.equal(y, x.T) and untouched()


def test_bits(op):
    """Words of 64 bits: from bytes, transposed, and as lanes."""
    places = torch.arange(64)
    for _ in range(5):
        words = torch.randint(-(2**63), 2**63 - 1, (64,))
        bits = words[:, None] >> places & 1
        op("transpose_bits")(words)
        assert torch.equal(words[:, None] >> places & 1, bits.T)
    for n in range(65):
        buffer = torch.full((n + 10,), 255, dtype=torch.uint8)
        found = torch.randint(0, 4, (n,), dtype=torch.uint8) * 77
        buffer[5 : n + 5] = found
        packed = op("bytes_to_bits")(buffer[5 : n + 5])
        assert torch.equal(packed >> places & 1 != 0, F.pad(found != 0, (0, 64 - n)))
    for dtype in (F32, F64):
        x, word = torch.randn(128, dtype=dtype), int(torch.randint(-(2**63), 2**63 - 1, ()))
        kept = (torch.tensor(word) >> places & 1).repeat(2) != 0
        assert torch.equal(op("select_by_bits")(x, word), x.where(kept, 0))


@pytest.mark.parametrize("n, keys, D", [(0, 3, 5), (1, 1, 1), (7, 4, 33), (5000, 3, 67), (9, 0, 4)])
def test_segment_sum(op, n, keys, D):
    """Empty, short and split segments; what has no key is not read; the same for any threads."""
    for dtype in (F32, F64, BF16, F16):
        rows = embedded(n, D, dtype, "rows", math.nan)
        weights = torch.randn(n).to(dtype)
        key = torch.randint(-1, keys + 1, (n,))
        dropped = (key < 0) | (key >= keys)
        rows[dropped] = math.nan
        expected = torch.zeros(keys, D, dtype=F64).index_add(
            0, key[~dropped], (weights.double()[:, None] * rows.double())[~dropped]
        )
        out, before = torch.full((keys + 2, D), 7.0, dtype=dtype), torch.get_num_threads()
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            op("segment_sum")(rows, key, weights, out[1:-1])
            results.append(out.clone())
        torch.set_num_threads(before)
        assert all(torch.equal(one, results[0]) for one in results)
        assert bool((out[[0, -1]] == 7).all())
        size = expected.abs().max().clamp(min=1) if expected.numel() else 1
        error = (out[1:-1].double() - expected).abs().max() if expected.numel() else 0
        assert error <= 16 * torch.finfo(dtype).eps * size


def test_segments_of_many_chunks(op):
    """Sorted by several tasks: the order within a key is that of the input."""
    n = 300_000
    rows = torch.arange(n, dtype=F64)[:, None]
    key = torch.randint(0, 5, (n,))
    out = torch.zeros(5, 1, dtype=F64)
    op("segment_sum")(rows, key, torch.ones(n, dtype=F64), out)
    assert torch.equal(out[:, 0], torch.bincount(key, rows[:, 0], minlength=5))


def test_limits(op):
    like = torch.zeros(1)
    assert op("fma_rate")(like) > 1e8
    assert op("bfloat16_rate")(like) >= 0
    source, target = torch.ones(1 << 20, dtype=torch.uint8), torch.zeros(1 << 20, dtype=torch.uint8)
    assert op("copy_bandwidth")(source, target) > 1e6
    assert torch.equal(source, target)
