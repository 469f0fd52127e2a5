"""What exact searches share: integers in the order of floats, and v of single pairs in float64."""

import triton
import triton.language as tl

from weft.triton_kernels.pairwise.pairs import DOT, SQUARED

NONE = tl.constexpr(2**63 - 1)  # the key of no pair


@triton.jit
def ordered_bits(v):
    """Integers in the order of the floats v; a NaN comes first, −0 equals 0."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    return tl.where(v == v, bits ^ ((bits >> 31) & 0x7FFFFFFF), -(2**31))


@triton.jit
def ordered_bits_64(v):
    bits = (v + 0.0).to(tl.int64, bitcast=True)
    return tl.where(v == v, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF), -(2**63))


@triton.jit
def of_ordered_bits(bits):
    """The floats whose ordered bits these are."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def exact_argument(points, wide, i, j, exist, BASE: tl.constexpr, BLOCK_D: tl.constexpr):
    """v, without its shift, of row i and columns j in float64; scale is the sum of two parts."""
    x, y, N, M, D, stride_xn, stride_xd, stride_ym, stride_yd = points
    scale_high, scale_low, row_factor, column_factor, bias = wide
    u = tl.zeros(j.shape, tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        a = tl.load(x + i * stride_xn + d * stride_xd, mask=d < D, other=0.0)
        inside = exist[:, None] & (d < D)[None, :]
        at = y + j[:, None] * stride_ym + d[None, :] * stride_yd
        b = tl.load(at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        a = tl.where(d < D, a.to(tl.float32).to(tl.float64), 0.0)[None, :]
        if BASE == DOT:
            term = a * b
        elif BASE == SQUARED:
            term = (a - b) * (a - b)
        else:
            term = tl.abs(a - b)
        u += tl.sum(tl.where(inside, term, 0.0), 1)
    rate = tl.zeros((1,), tl.float64) + scale_high + scale_low
    if row_factor is not None:
        rate *= tl.load(row_factor + i).to(tl.float64)
    v = rate * u
    if column_factor is not None:
        v *= tl.load(column_factor + j, mask=exist, other=1.0).to(tl.float64)
    if bias is not None:
        v += tl.load(bias + j, mask=exist, other=0.0).to(tl.float64)
    return v
