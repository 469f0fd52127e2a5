"""One problem of a batch as the kernels see it: its extended matrix of costs without the padding.

Rows and columns are numbered 0, 1, ... without what lies beyond the lengths, a dustbin comes last.
So a padded problem is computed as the same problem without its padding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INFINITY = tl.constexpr(float("inf"))


class Arguments(NamedTuple):
    """Of every op on cost matrices (weft/ops/transport/problem.py), as the kernels take them; None
    for what is absent. Vectors are contiguous."""

    cost: object
    cost_strides: object  # (z, i, j)
    sign: object  # −1.0: the costs are −cost
    mask: object
    mask_strides: object
    rows: object
    columns: object
    border: object
    a: object  # (B, N + has_row)
    b: object
    epsilon: object
    N: object
    M: object
    has_row: object  # 1 with a dustbin, else 0
    has_column: object


def whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def arguments_of(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    border: Tensor | None,
    similarity: bool,
) -> Arguments:
    _, N, M = cost.shape
    return Arguments(
        *(cost, cost.stride(), -1.0 if similarity else 1.0),
        *(mask, None if mask is None else mask.stride()),
        *(whole(rows), whole(columns), whole(border), whole(a), whole(b), whole(epsilon)),
        *(N, M, a.shape[1] - N, b.shape[1] - M),
    )


@triton.jit
def sizes_of(p, z):
    """How many rows and columns problem z has, without dustbins; bad lengths are clamped."""
    n, m = z * 0 + p.N, z * 0 + p.M
    if p.rows is not None:
        n = tl.minimum(tl.maximum(tl.load(p.rows + z), 0), n)
    if p.columns is not None:
        m = tl.minimum(tl.maximum(tl.load(p.columns + z), 0), m)
    return n, m


@triton.jit
def places(z, k, n, N, more):
    """Where entries k of a vector (B, N + more) of problem z are: a dustbin is behind the
    padding."""
    return z * (N + more) + tl.where(k < n, k, N)


@triton.jit
def entries(vector, z, k, n, N, more, other):
    """Those entries, `other` outside."""
    return tl.load(vector + places(z, k, n, N, more), mask=k < n + more, other=other)


@triton.jit
def costs(p, z, i, j, n, m):
    """C of rows i and columns j of the extended matrix in float32, +∞ outside."""
    inside = (i < n)[:, None] & (j < m)[None, :]
    at = p.cost + z * p.cost_strides[0]
    at += i[:, None] * p.cost_strides[1] + j[None, :] * p.cost_strides[2]
    c = tl.load(at, mask=inside, other=0.0).to(tl.float32) * p.sign
    if p.mask is not None:
        at = p.mask + z * p.mask_strides[0]
        at += i[:, None] * p.mask_strides[1] + j[None, :] * p.mask_strides[2]
        inside = inside & (tl.load(at, mask=inside, other=0) != 0)
    c = tl.where(inside, c, INFINITY)
    if p.border is not None:
        last_row = (i == n) & (i < n + p.has_row)
        last_column = (j == m) & (j < m + p.has_column)
        to_column, to_row, corner = (
            tl.load(p.border + 3 * z),
            tl.load(p.border + 3 * z + 1),
            tl.load(p.border + 3 * z + 2),
        )
        c = tl.where((i < n)[:, None] & last_column[None, :], to_column, c)
        c = tl.where(last_row[:, None] & (j < m)[None, :], to_row, c)
        c = tl.where(last_row[:, None] & last_column[None, :], corner, c)
    return c


@triton.jit
def ratio(x, a, b):
    """e = exp x; 0 where there is no pair, and where neither side has weight."""
    none = (x == -INFINITY) | ((a == 0)[:, None] & (b == 0)[None, :])
    return tl.where(none, 0.0, tl.exp(tl.where(none, 0.0, x)))


@triton.jit
def inverse_of(eps):
    """1/ε as a sum of two numbers, to multiply by: one alone is a rounding off, for all entries the
    same way. Both are > 0, so that −∞ times them is −∞."""
    exact = 1.0 / eps.to(tl.float64)
    near = exact.to(tl.float32)
    near = tl.where(near.to(tl.float64) < exact, near, near * (1.0 - 2.0**-23))
    return near, (exact - near.to(tl.float64)).to(tl.float32)


@triton.jit
def finite(x):
    """0 in place of infinities."""
    return tl.where(tl.abs(x) == INFINITY, 0.0, x)


@triton.jit
def expm1(x):
    """By its series where e^x − 1 would cancel."""
    series = 1.0 + x * (1.0 / 7 + x * (1.0 / 56 + x / 504))
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * series))))
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def is_constraint(rho):
    """Of a number that the interpreter keeps as Python's."""
    return tl.zeros((1,), tl.float32) + rho == INFINITY


@triton.jit
def penalty(potentials, rho, exact):
    """φ(p) = ρ (1 − e^(−p / ρ)); p where ρ is infinite and where `exact`."""
    soft = -rho * expm1(-potentials / rho)
    return tl.where(is_constraint(rho) | exact, potentials, soft)


@triton.jit
def log_weight(weight):
    """log w, −∞ where w is 0."""
    return tl.where(weight == 0, -INFINITY, tl.log(tl.where(weight == 0, 1.0, weight)))


def example_problems(dtype: torch.dtype) -> list[tuple]:
    """Arguments on meta tensors that specialise differently: plain, masked with lengths, with a
    dustbin and a transposed cost, long."""
    make = lambda *shape, d=torch.float32: torch.empty(*shape, dtype=d, device="meta")  # noqa: E731

    def problem(B, N, M, more=0):
        return make(B, N, M, d=dtype), make(B, N + more), make(B, M + more), make(B)

    lengths = make(64, d=torch.int64), make(64, d=torch.int64)
    masked = make(64, 256, 256, d=torch.bool)
    cost, *others = problem(8, 300, 500, 1)
    transposed = make(8, 500, 300, d=dtype).mT
    return [
        (*problem(64, 256, 256), None, None, None, None, False),
        (*problem(64, 256, 256), masked, *lengths, None, True),
        (transposed, *others, None, None, None, make(8, 3), False),
        (*problem(1, 2048, 2048), None, None, None, None, False),
        (*problem(1, 4000, 20000), None, None, None, None, False),
    ]
