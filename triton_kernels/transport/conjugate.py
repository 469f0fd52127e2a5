"""Conjugate gradients on the device, a problem in each program: what follows a product with e.

The implicit gradient's system (implicit.py) is singular where both marginals are constraints, along
X = a, Y = −b; a difference of the sums of its right side is spread, and rounding taken out.
"""

import triton
import triton.language as tl

from weft.triton_kernels.transport.problem import INFINITY, entries, places, sizes_of

TOLERANCE, PATIENCE = tl.constexpr(1e-8), tl.constexpr(30.0)
LEAST = tl.constexpr(64 * 2.0**-23)  # of a diagonal that is a difference
# Vectors over the columns, (B, VECTORS, M') float64, and state, (B, STATE) float64.
PSI, DIAGONAL, DELTA, BEST_Y, NOW_Y, R, STEP, VECTORS = map(tl.constexpr, range(8))
GOING, NOW, BEST, RATIO, COUNTED, BEST_AT, ENOUGH = map(tl.constexpr, range(7))
SPREAD, MASS, ALL_MASS, TRACE, STATE = map(tl.constexpr, range(7, 12))


@triton.jit
def begin(p, s, z, sums, squares, rho_b, BALANCED: tl.constexpr, BLOCK: tl.constexpr):
    """ψ, the diagonal, and cotangents that the balanced system can give: a difference of the sums
    of γ and δ is spread over them."""
    n, m = sizes_of(p, z)
    N, M = p.N + p.has_row, p.M + p.has_column
    eps = tl.load(p.epsilon + z)
    vectors = s.vectors + z * VECTORS * M
    all_mass = tl.zeros((BLOCK,), tl.float64)
    mass, excess, trace = all_mass, all_mass, all_mass
    for start in range(0, n + p.has_row, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        a = entries(p.a, z, i, n, p.N, p.has_row, 0.0).to(tl.float64)
        some = tl.load(s.phi + z * N + i, mask=i < n + p.has_row, other=0.0) != 0
        all_mass += a
        mass += tl.where(some, a, 0.0)
        gamma = entries(s.grad_f, z, i, n, p.N, p.has_row, 0.0).to(tl.float64)
        excess += tl.where(some, gamma, 0.0)
    for start in range(0, m + p.has_column, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = j < m + p.has_column
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0).to(tl.float64)
        total = tl.load(sums + z * M + j, mask=inside, other=0.0).to(tl.float64)
        square = tl.load(squares + z * M + j, mask=inside, other=0.0).to(tl.float64)
        all_mass += b
        mass += tl.where(total != 0, b, 0.0)
        delta = entries(s.grad_g, z, j, m, p.M, p.has_column, 0.0).to(tl.float64)
        excess -= tl.where(total != 0, delta, 0.0)
        psi = tl.where((j == m) & inside, 1.0, 1.0 + eps / rho_b) * total
        psi = tl.where(total == 0, 1.0, psi)
        diagonal = tl.maximum(b * psi - b * b * square, LEAST * (b * psi))
        trace += diagonal
        # 0 says that there is no pair; it counts as 1.
        tl.store(vectors + PSI * M + j, tl.where(total == 0, 0.0, psi), mask=inside)
        tl.store(vectors + DIAGONAL * M + j, diagonal, mask=inside)
    tl.debug_barrier()
    whole_mass, spread = tl.sum(mass, 0), tl.sum(excess, 0)
    free = whole_mass > 0
    spread = tl.where(free, spread / tl.where(free, whole_mass, 1.0), 0.0)
    if not BALANCED:
        spread *= 0.0
        whole_mass *= 0.0
    for start in range(0, n + p.has_row, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        a = entries(p.a, z, i, n, p.N, p.has_row, 0.0).to(tl.float64)
        gamma = entries(s.grad_f, z, i, n, p.N, p.has_row, 0.0).to(tl.float64)
        tl.store(s.gamma + z * N + i, gamma - a * spread, mask=i < n + p.has_row)
    for start in range(0, m + p.has_column, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = j < m + p.has_column
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0).to(tl.float64)
        delta = entries(s.grad_g, z, j, m, p.M, p.has_column, 0.0).to(tl.float64) + b * spread
        psi = tl.load(vectors + PSI * M + j, mask=inside, other=0.0)
        of_none = tl.where(b == 0, delta / tl.where(psi == 0, 1.0, psi), 0.0)
        tl.store(vectors + DELTA * M + j, delta, mask=inside)
        tl.store(s.v + z * M + j, of_none.to(tl.float32), mask=inside)
    state = s.state + z * STATE
    tl.store(state + SPREAD, spread)
    tl.store(state + MASS, whole_mass)
    tl.store(state + ALL_MASS, tl.sum(all_mass, 0))
    tl.store(state + TRACE, tl.sum(trace, 0))


@triton.jit
def norm(p, s, z, outside, BALANCED: tl.constexpr, BLOCK: tl.constexpr):
    """rᵀ diagonal⁻¹ r. Rounding gives a balanced residual a part outside of what y can change,
    which would grow: it is taken out."""
    _, m = sizes_of(p, z)
    M = p.M + p.has_column
    vectors = s.vectors + z * VECTORS * M
    trace = tl.load(s.state + z * STATE + TRACE)
    share = outside / tl.where(trace > 0, trace, 1.0)
    if not BALANCED:
        share *= 0.0
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, m + p.has_column, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = j < m + p.has_column
        diagonal = tl.load(vectors + DIAGONAL * M + j, mask=inside, other=0.0)
        r = tl.load(vectors + R * M + j, mask=inside, other=0.0) - share * diagonal
        tl.store(vectors + R * M + j, r, mask=inside)
        total += tl.where(diagonal == 0, 0.0, r * r / tl.where(diagonal == 0, 1.0, diagonal))
    return tl.sum(total, 0)


@triton.jit
def turn(p, s, z, ratio_of, better, BLOCK: tl.constexpr):
    """The next direction; y is kept if it is the best so far."""
    _, m = sizes_of(p, z)
    M = p.M + p.has_column
    vectors = s.vectors + z * VECTORS * M
    for start in range(0, m + p.has_column, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = j < m + p.has_column
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0).to(tl.float64)
        diagonal = tl.load(vectors + DIAGONAL * M + j, mask=inside, other=0.0)
        r = tl.load(vectors + R * M + j, mask=inside, other=0.0)
        step = ratio_of * tl.load(vectors + STEP * M + j, mask=inside, other=0.0)
        step += tl.where(diagonal == 0, 0.0, r / tl.where(diagonal == 0, 1.0, diagonal))
        tl.store(vectors + STEP * M + j, step, mask=inside)
        tl.store(s.v + z * M + j, (b * step).to(tl.float32), mask=inside)
        now = tl.load(vectors + NOW_Y * M + j, mask=inside, other=0.0)
        best = tl.load(vectors + BEST_Y * M + j, mask=inside, other=0.0)
        tl.store(vectors + BEST_Y * M + j, tl.where(better, now, best), mask=inside)


@triton.jit
def start_steps(p, s, z, sums, BALANCED: tl.constexpr, BLOCK: tl.constexpr):
    """The right side is the first residual."""
    _, m = sizes_of(p, z)
    M = p.M + p.has_column
    vectors = s.vectors + z * VECTORS * M
    outside = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, m + p.has_column, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = j < m + p.has_column
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0).to(tl.float64)
        through = tl.load(sums + z * M + j, mask=inside, other=0.0).to(tl.float64)
        delta = tl.load(vectors + DELTA * M + j, mask=inside, other=0.0)
        r = tl.where(b == 0, 0.0, delta + b * through)
        outside += r
        tl.store(vectors + R * M + j, r, mask=inside)
        tl.store(vectors + BEST_Y * M + j, r * 0.0, mask=inside)
        tl.store(vectors + NOW_Y * M + j, r * 0.0, mask=inside)
        tl.store(vectors + STEP * M + j, r * 0.0, mask=inside)
    now = norm(p, s, z, tl.sum(outside, 0), BALANCED, BLOCK)
    turn(p, s, z, now * 0.0, now != now, BLOCK)
    state = s.state + z * STATE
    enough = now * TOLERANCE * TOLERANCE
    tl.store(state + NOW, now)
    tl.store(state + BEST, now)
    tl.store(state + ENOUGH, enough)
    tl.store(state + COUNTED, now * 0.0)
    tl.store(state + BEST_AT, now * 0.0)
    tl.store(state + GOING, tl.where((now > 0) & (now < INFINITY), 1.0, 0.0))


@triton.jit
def advance(p, s, z, sums, most, BALANCED: tl.constexpr, BLOCK: tl.constexpr):
    """A step, until the residual is small or has not become smaller for long."""
    _, m = sizes_of(p, z)
    M = p.M + p.has_column
    vectors, state = s.vectors + z * VECTORS * M, s.state + z * STATE
    curvature = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, m + p.has_column, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        step, product = products(p, z, vectors, sums, j, j < m + p.has_column, m, M)
        curvature += step * product
    bend = tl.sum(curvature, 0)
    length = tl.load(state + NOW) / tl.where(bend > 0, bend, 1.0)
    if bend > 0:
        outside = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, m + p.has_column, BLOCK):
            j = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = j < m + p.has_column
            step, product = products(p, z, vectors, sums, j, inside, m, M)
            y = tl.load(vectors + NOW_Y * M + j, mask=inside, other=0.0) + length * step
            r = tl.load(vectors + R * M + j, mask=inside, other=0.0) - length * product
            tl.store(vectors + NOW_Y * M + j, y, mask=inside)
            tl.store(vectors + R * M + j, r, mask=inside)
            outside += r
        next = norm(p, s, z, tl.sum(outside, 0), BALANCED, BLOCK)
        best, count = tl.load(state + BEST), tl.load(state + COUNTED) + 1.0
        better = next < best
        turn(p, s, z, next / tl.load(state + NOW), better, BLOCK)
        best_at = tl.where(better, count, tl.load(state + BEST_AT))
        goes = (next > tl.load(state + ENOUGH)) & (count < most) & (count - best_at < PATIENCE)
        tl.store(state + NOW, next)
        tl.store(state + BEST, tl.where(better, next, best))
        tl.store(state + COUNTED, count)
        tl.store(state + BEST_AT, best_at)
        tl.store(state + GOING, tl.where(goes, 1.0, 0.0))
    else:
        tl.store(state + GOING, bend * 0.0)


@triton.jit
def products(p, z, vectors, sums, j, inside, m, M):
    """(the direction, the system times the direction) of columns j."""
    b = entries(p.b, z, j, m, p.M, p.has_column, 0.0).to(tl.float64)
    through = tl.load(sums + z * M + j, mask=inside, other=0.0).to(tl.float64)
    psi = tl.load(vectors + PSI * M + j, mask=inside, other=0.0)
    step = tl.load(vectors + STEP * M + j, mask=inside, other=0.0)
    return step, b * (tl.where(psi == 0, 1.0, psi) * step - through)


@triton.jit
def finish(p, s, z, BLOCK: tl.constexpr):
    """Y, from which the last product makes X."""
    _, m = sizes_of(p, z)
    M = p.M + p.has_column
    vectors = s.vectors + z * VECTORS * M
    for start in range(0, m + p.has_column, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = j < m + p.has_column
        b = entries(p.b, z, j, m, p.M, p.has_column, 0.0).to(tl.float64)
        psi = tl.load(vectors + PSI * M + j, mask=inside, other=0.0)
        delta = tl.load(vectors + DELTA * M + j, mask=inside, other=0.0)
        y = b * tl.load(vectors + BEST_Y * M + j, mask=inside, other=0.0)
        y = tl.where(b == 0, delta / tl.where(psi == 0, 1.0, psi), y).to(tl.float32)
        tl.store(s.v + z * M + j, y, mask=inside)
        tl.store(s.Y + places(z, j, m, p.M, p.has_column), y, mask=inside)


@triton.jit
def choose(p, s, z, BLOCK: tl.constexpr):
    """Of the solutions X + t a, Y − t b of a balanced system, the reference's."""
    n, m = sizes_of(p, z)
    N, M = p.N + p.has_row, p.M + p.has_column
    state = s.state + z * STATE
    mass = tl.load(state + MASS)
    if mass > 0:
        apart = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, n + p.has_row, BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            apart -= entries(s.X, z, i, n, p.N, p.has_row, 0.0).to(tl.float64)
        for start in range(0, m + p.has_column, BLOCK):
            j = start + tl.arange(0, BLOCK).to(tl.int64)
            apart += entries(s.Y, z, j, m, p.M, p.has_column, 0.0).to(tl.float64)
        shift = tl.load(state + SPREAD) * tl.load(state + ALL_MASS) + tl.sum(apart, 0)
        shift = shift / mass
        tl.debug_barrier()
        for start in range(0, n + p.has_row, BLOCK):
            i = start + tl.arange(0, BLOCK).to(tl.int64)
            some = tl.load(s.phi + z * N + i, mask=i < n + p.has_row, other=0.0) != 0
            a = entries(p.a, z, i, n, p.N, p.has_row, 0.0)
            at = s.X + places(z, i, n, p.N, p.has_row)
            X = tl.load(at, mask=i < n + p.has_row, other=0.0) + tl.where(some, a * shift, 0.0)
            tl.store(at, X.to(tl.float32), mask=i < n + p.has_row)
        for start in range(0, m + p.has_column, BLOCK):
            j = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = j < m + p.has_column
            psi = tl.load(s.vectors + (z * VECTORS + PSI) * M + j, mask=inside, other=0.0)
            b = entries(p.b, z, j, m, p.M, p.has_column, 0.0)
            at = s.Y + places(z, j, m, p.M, p.has_column)
            Y = tl.load(at, mask=inside, other=0.0) - tl.where(psi != 0, b * shift, 0.0)
            tl.store(at, Y.to(tl.float32), mask=inside)
