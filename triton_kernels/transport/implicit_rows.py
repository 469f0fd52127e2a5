"""Products with e and its transpose, for the implicit gradient: what its steps do with the costs.

A block of rows is multiplied by a vector over the columns, weighted, and added to the columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from weft.triton_kernels.transport.problem import (
    costs,
    entries,
    places,
    ratio,
    sizes_of,
)


class System(NamedTuple):
    """What the kernels share beside the problem. Scratch is numbered without padding."""

    f: object
    g: object
    grad_f: object
    grad_g: object
    phi: object  # (B, N'), 0 of a row without a pair
    gamma: object  # (B, N') float64
    v: object  # (B, M'), what e is multiplied by
    X: object  # the solution, as the potentials lie
    Y: object
    partial: object  # (B, blocks, M'), what blocks of rows give to the columns; and squares
    squares: object
    vectors: object
    state: object


@triton.jit
def row_weights(p, s, z, i, last, n, a, product, KIND: tl.constexpr):
    """(a_i Σ_j e_ij v_j − γ_i) / φ_i; of KIND "gamma", −X_i."""
    phi = tl.load(s.phi + z * (p.N + p.has_row) + i, mask=i < last, other=0.0)
    weights = (a * product).to(tl.float64)
    if KIND == "gamma":
        weights -= tl.load(s.gamma + z * (p.N + p.has_row) + i, mask=i < last, other=0.0)
    weights = (weights / tl.where(phi == 0, 1.0, phi)).to(tl.float32)
    if KIND == "gamma":
        tl.store(s.X + places(z, i, n, p.N, p.has_row), -weights, mask=i < last)
    return weights


@triton.jit
def row_sums(p, s, z, i, last, n, product, rho_a, eps):
    """φ_i, stored."""
    exact = (i == n) & (i < n + p.has_row)
    phi = tl.where(exact, 1.0, 1.0 + eps / rho_a) * product
    tl.store(s.phi + z * (p.N + p.has_row) + i, phi, mask=i < last)
    return phi


@triton.jit
def rows_of(
    p,
    s,
    z,
    block,
    first,
    last,
    rho_a,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows [first, last) of a product with e and its transpose, to part `block` of the sums.

    KIND: "prepare" makes φ, Σ_i a_i e_ij and Σ_i e_ij² a_i / φ_i; "gamma", "plain": row_weights.
    Where they are WHOLE, rows are made once; else, by tiles, twice, and there are BLOCK_N."""
    n, m = sizes_of(p, z)
    eps = tl.load(p.epsilon + z)
    inverse = 1.0 / eps
    width = m + p.has_column
    to = block * (p.M + p.has_column)
    if WHOLE:
        j = tl.arange(0, BLOCK_M).to(tl.int64)
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
        g = entries(s.g, z, j, m, p.M, p.has_column, 0.0)
        if KIND == "prepare":
            v = b
        else:
            v = tl.load(s.v + z * (p.M + p.has_column) + j, mask=j < width, other=0.0)
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        squares = sums
        for start in range(first, last, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N).to(tl.int64)
            a = tl.where(i < last, entries(p.a, z, i, n, p.N, p.has_row, 0.0), 0.0)
            f = entries(s.f, z, i, n, p.N, p.has_row, 0.0)
            x = (f[:, None] + g[None, :] - costs(p, z, i, j, n, m)) * inverse
            e = ratio(x, a, b)
            product = tl.sum(e * v[None, :], 1)
            if KIND == "prepare":
                phi = row_sums(p, s, z, i, last, n, product, rho_a, eps)
                share = a / tl.where(phi == 0, 1.0, phi)
                sums += e * a[:, None]
                squares += e * (e * share[:, None])
            else:
                sums += e * row_weights(p, s, z, i, last, n, a, product, KIND)[:, None]
        tl.store(s.partial + to + j, tl.sum(sums, 0), mask=j < width)
        if KIND == "prepare":
            tl.store(s.squares + to + j, tl.sum(squares, 0), mask=j < width)
    else:
        i = first + tl.arange(0, BLOCK_N).to(tl.int64)
        a = tl.where(i < last, entries(p.a, z, i, n, p.N, p.has_row, 0.0), 0.0)
        f = entries(s.f, z, i, n, p.N, p.has_row, 0.0)
        product = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, width, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M).to(tl.int64)
            b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
            g = entries(s.g, z, j, m, p.M, p.has_column, 0.0)
            x = (f[:, None] + g[None, :] - costs(p, z, i, j, n, m)) * inverse
            if KIND == "prepare":
                v = b
            else:
                v = tl.load(s.v + z * (p.M + p.has_column) + j, mask=j < width, other=0.0)
            product += tl.sum(ratio(x, a, b) * v[None, :], 1)
        if KIND == "prepare":
            phi = row_sums(p, s, z, i, last, n, product, rho_a, eps)
            weights = a / tl.where(phi == 0, 1.0, phi)
        else:
            weights = row_weights(p, s, z, i, last, n, a, product, KIND)
        for start in range(0, width, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M).to(tl.int64)
            b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
            g = entries(s.g, z, j, m, p.M, p.has_column, 0.0)
            x = (f[:, None] + g[None, :] - costs(p, z, i, j, n, m)) * inverse
            e = ratio(x, a, b)
            if KIND == "prepare":
                square = tl.sum(e * (e * weights[:, None]), 0)
                tl.store(s.squares + to + j, square, mask=j < width)
                tl.store(s.partial + to + j, tl.sum(e * a[:, None], 0), mask=j < width)
            else:
                sums = tl.sum(e * weights[:, None], 0)
                tl.store(s.partial + to + j, sums, mask=j < width)
