"""The two halves of an iteration of Sinkhorn's, as the kernels share them.

Rows:    x_ij = log b_j + (g_j − C_ij) / ε,  q_ij = exp(x_ij − max_j x_ij),  s_i = Σ_j q_ij,
         f_i* = −ε (max + log s_i),  w_i = (a_i / s_i) exp((f_i − f_i*) / ε)
Columns: c_j = Σ_i w_i q_ij,  g_j* = g_j − ε log(c_j / b_j)

One exponential of each entry serves both. Where c_j has lost its digits to underflow, the soft
minimum of the column is made from the costs (`column_minima`). f is f*, damped or over-relaxed.
"""

import triton
import triton.language as tl

from weft.triton_kernels.transport.problem import (
    INFINITY,
    costs,
    entries,
    expm1,
    finite,
    inverse_of,
    log_weight,
    places,
)

LEAST, MOST = tl.constexpr(1e-30), tl.constexpr(1e30)  # of a ratio c_j / b_j with all its digits
LEAST_SUM = tl.constexpr(1e-34)
CHECK = tl.constexpr(20)  # iterations between decisions, as in reference/transport/sinkhorn.py
STALLED, LARGEST_FACTOR, CAUTION = tl.constexpr(0.95), tl.constexpr(1.97), tl.constexpr(0.9)
ROUNDING = tl.constexpr(2.0**-23)


@triton.jit
def damping(rho, eps, k, n, more):
    """λ = ρ / (ρ + ε) of entries k, 1 of a constraint and of a dustbin."""
    return tl.where((k == n) & (k < n + more), 1.0, 1.0 / (1.0 + eps / rho))


@triton.jit
def relaxed(old, best, omega):
    omega += tl.zeros(best.shape, tl.float32)  # the interpreter has no | of a scalar and a tile
    moved = finite(old) + omega * (finite(best) - finite(old))
    return tl.where((omega == 1.0) | (tl.abs(best) == INFINITY), best, moved)


@triton.jit
def missed(weight, potential, step):
    """w |e^step − 1|, what an entry of a marginal is off by; all of w where p is −∞."""
    off = tl.where(potential == -INFINITY, 1.0, tl.abs(expm1(step)))
    return tl.where(weight > 0, weight * off, 0.0)


@triton.jit
def joined(top, total, other_top, other_total):
    """Sums of exponentials around `top` and `other_top`, around the larger."""
    most = tl.maximum(top, other_top)
    safe = tl.where(most == -INFINITY, 0.0, most)
    return most, total * tl.exp(top - safe) + other_total * tl.exp(other_top - safe)


@triton.jit
def log_mass(weight, potential, rho):
    """log(w e^(−p / ρ)); a potential of −∞ counts as 0."""
    return log_weight(weight) - finite(potential) / rho


@triton.jit
def sweep(
    p,
    z,
    first,
    last,
    j,
    f,
    g,
    b,
    omega,
    eps,
    rho_a,
    n,
    m,
    RELAX: tl.constexpr,
    DAMPED: tl.constexpr,
    TRANSLATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Updates f of rows [first, last) from g of all columns j. Returns what they give to c, how
    many of them have mass, by how much they are off, and the sum (top, total) of `log_mass`."""
    inverse, rest = inverse_of(eps)
    log_b = log_weight(b)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    alive = tl.zeros((BLOCK_N,), tl.float32)
    error, total, top = alive, alive, alive - INFINITY
    for start in range(first, last, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N).to(tl.int64)
        a = tl.where(i < last, entries(p.a, z, i, n, p.N, p.has_row, 0.0), 0.0)
        gap = g[None, :] - costs(p, z, i, j, n, m)
        x = gap * inverse + (gap * rest + log_b[None, :])
        most = tl.max(x, 1)
        most = tl.where(most == -INFINITY, 0.0, most)
        q = tl.exp(x - most[:, None])
        s = tl.sum(q, 1)
        none = s == 0
        s = tl.where(none, 1.0, s)
        star = -eps * (most + tl.log(s))
        new = tl.where(none, -INFINITY, damping(rho_a, eps, i, n, p.has_row) * star)
        if RELAX:
            old = entries(f, z, i, n, p.N, p.has_row, 0.0)
            best, new = new, relaxed(old, new, omega)
            error += missed(a, new, (new - best) * inverse)
        w = tl.where(none, 0.0, a / s)
        if RELAX or DAMPED:
            w *= tl.exp(tl.where(none, 0.0, (new - star) * inverse))
        sums += w[:, None] * q
        alive += tl.where((a > 0) & ~none, 1.0, 0.0)
        if TRANSLATED:
            top, total = joined(top, total, log_mass(a, new, rho_a), 1.0)
        tl.store(f + places(z, i, n, p.N, p.has_row), new, mask=i < last)
    highest = tl.max(top, 0)
    safe = tl.where(highest == -INFINITY, 0.0, highest)
    total = tl.sum(total * tl.exp(top - safe), 0)
    return tl.sum(sums, 0), tl.sum(alive, 0), tl.sum(error, 0), highest, total


@triton.jit
def column_minima(p, z, j, f, eps, n, m, BLOCK_N: tl.constexpr):
    """−ε log Σ_i a_i e^((f_i − C_ij) / ε) of columns j, +∞ where nothing is summed."""
    inverse, rest = inverse_of(eps)
    top = tl.full(j.shape, -INFINITY, tl.float32)
    total = tl.zeros(j.shape, tl.float32)
    for start in range(0, n + p.has_row, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N).to(tl.int64)
        log_a = log_weight(entries(p.a, z, i, n, p.N, p.has_row, 0.0))
        f_i = entries(f, z, i, n, p.N, p.has_row, 0.0)
        gap = f_i[:, None] - costs(p, z, i, j, n, m)
        x = gap * inverse + (gap * rest + log_a[:, None])
        most = tl.max(x, 0)
        safe = tl.where(most == -INFINITY, 0.0, most)
        top, total = joined(top, total, most, tl.sum(tl.exp(x - safe[None, :]), 0))
    none = total == 0
    return tl.where(none, INFINITY, -eps * (top + tl.log(tl.where(none, 1.0, total))))


@triton.jit
def next_columns(
    p,
    z,
    j,
    b,
    g,
    c,
    change,
    f,
    omega,
    eps,
    rho_b,
    n,
    m,
    RELAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(g, step) of columns j: step = (g before − g*) / ε. Columns that no row reached before are
    asked again where the number of rows with mass has changed; those of weight 0 stay."""
    known = (c > LEAST * b) & (c < MOST * b) & (c > LEAST_SUM)
    dead = g == -INFINITY
    lost = (b > 0) & ~known & (~dead | (tl.zeros(b.shape, tl.float32) + change != 0))
    log_ratio = tl.log(tl.where(known, c / tl.where(known, b, 1.0), 1.0))
    soft = tl.where(dead, INFINITY, g - eps * log_ratio)
    if tl.max(lost.to(tl.int32), 0) > 0:
        soft = tl.where(lost, column_minima(p, z, j, f, eps, n, m, BLOCK_N), soft)
    damp = damping(rho_b, eps, j, m, p.has_column)
    best = tl.where(soft == INFINITY, -INFINITY, damp * soft)
    best = tl.where(b > 0, best, g)
    step = tl.where(lost | (damp != 1.0), (finite(g) - finite(best)) / eps, log_ratio)
    if RELAX:
        best = relaxed(g, best, omega)
    return best, step


@triton.jit
def next_factor(omega, cap, rate):
    """The relaxation factor and the largest one allowed (reference/transport/sinkhorn.py)."""
    grew = rate >= 1.0
    apart = rate + omega - 1.0
    squared = apart * apart / (rate * omega * omega)
    squared = tl.minimum(tl.maximum(squared, 0.0), 1.0)
    best = tl.minimum(2.0 / (1.0 + tl.sqrt(1.0 - squared)), cap)
    raised = tl.where(~grew & (rate > omega - 1.0), tl.maximum(omega, best), omega)
    lowered = tl.where(grew & (omega > 1.0), 1.0 + CAUTION * (cap - 1.0), cap)
    return tl.where(grew, 1.0, raised), lowered


@triton.jit
def decide(count, error, floor, omega, cap, halfway, checked, tolerance, RELAX: tl.constexpr):
    """(1 or 0: another iteration, omega, cap, halfway, checked) after iteration `count`; `floor` is
    the error that rounding leaves."""
    met = error <= tolerance
    stops = met & (omega == 1.0)
    omega = tl.where(met, 1.0, omega)
    halfway = tl.where(count % CHECK == CHECK // 2, error, halfway)
    checks = count % CHECK == 0
    stops = stops | (checks & (error > STALLED * checked) & (error <= floor))
    if RELAX:
        rate = tl.exp(tl.log(error / halfway) * (2.0 / CHECK))
        factor, lowered = next_factor(omega, cap, tl.where(met, INFINITY, rate))
        omega, cap = tl.where(checks, factor, omega), tl.where(checks, lowered, cap)
    checked = tl.where(checks, error, checked)
    return tl.where(stops, 0, 1), omega, cap, halfway, checked


@triton.jit
def shift_of(top_a, total_a, top_b, total_b, rho_a, rho_b):
    """The best t of (f + t, g − t), in an unbalanced problem."""
    of_a = top_a + tl.log(total_a)
    of_b = top_b + tl.log(total_b)
    return finite(rho_a * rho_b / (rho_a + rho_b) * (of_a - of_b))
