"""The implicit gradient of optimal potentials, of cotangents γ and δ (weft/reference/transport/
gradients.py has the system). Without its X, and with Y_j = b_j y_j, it is symmetric:

    b_j ψ_j y_j − b_j Σ_i e_ij (a_i / φ_i) Σ_k e_ik b_k y_k = δ_j − b_j Σ_i e_ij γ_i / φ_i

with φ_i = (1 + ε/ρ_a) Σ_j b_j e_ij and ψ_j likewise. Conjugate gradients, preconditioned by the
diagonal, solve it; each step makes every e anew, from the costs. A column of weight 0 has
Y_j = δ_j / ψ_j, so nothing divides by a weight. Vectors are float64, products float32.

A problem of small size is one program's; of others a step is a launch over blocks of rows, a sum of
what they give to the columns, and a launch for the vectors. Both look at a flag of the problem's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.triton_kernels.common import Config, configure, launch
from weft.triton_kernels.transport import conjugate
from weft.triton_kernels.transport.conjugate import advance, begin, choose, finish, start_steps
from weft.triton_kernels.transport.implicit_rows import System, rows_of
from weft.triton_kernels.transport.plan import COUNT, Upstream, gradients
from weft.triton_kernels.transport.problem import arguments_of, example_problems, sizes_of

TABLE = {
    (80, "rows"): Config({"BLOCK_N": 16, "BLOCK_M": 64}, num_warps=4),
    (80, "vectors"): Config({"BLOCK": 1024}, num_warps=4),
}
# A program with whole rows, by the power of two that they are padded to.
PROBLEM = {
    (80, 64): Config({"BLOCK_N": 32}, num_warps=4),
    (80, 128): Config({"BLOCK_N": 16}, num_warps=4),
    (80, 256): Config({"BLOCK_N": 16}, num_warps=8),
    (80, 512): Config({"BLOCK_N": 4}, num_warps=8),
}
LONGEST = 512  # row of which registers hold several, and two sums like them
ENTRIES = 1 << 19  # of a problem that one program solves
STEPS = 200  # of a problem that many programs solve
GOING, STATE = conjugate.GOING, conjugate.STATE


@triton.jit
def problem_kernel(
    sums,
    p,
    s,
    rho_a,
    rho_b,
    BALANCED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Prepares and solves one problem; leaves X and Y. sums: s.partial, of one block."""
    z = tl.program_id(0).to(tl.int64)
    n, m = sizes_of(p, z)
    first, last = n * 0, n + p.has_row
    most = (50 + 4 * tl.minimum(n, m)).to(tl.float64)
    rows_of(p, s, z, z, first, last, rho_a, "prepare", True, BLOCK_N, BLOCK_M)
    tl.debug_barrier()
    begin(p, s, z, sums, s.squares, rho_b, BALANCED, BLOCK)
    tl.debug_barrier()
    rows_of(p, s, z, z, first, last, rho_a, "gamma", True, BLOCK_N, BLOCK_M)
    tl.debug_barrier()
    start_steps(p, s, z, sums, BALANCED, BLOCK)
    tl.debug_barrier()
    while tl.load(s.state + z * STATE + GOING) > 0:
        rows_of(p, s, z, z, first, last, rho_a, "plain", True, BLOCK_N, BLOCK_M)
        tl.debug_barrier()
        advance(p, s, z, sums, most, BALANCED, BLOCK)
        tl.debug_barrier()
    finish(p, s, z, BLOCK)
    tl.debug_barrier()
    rows_of(p, s, z, z, first, last, rho_a, "gamma", True, BLOCK_N, BLOCK_M)
    tl.debug_barrier()
    choose(p, s, z, BLOCK)


@triton.jit
def rows_kernel(
    partial,
    p,
    s,
    rho_a,
    blocks,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A product; of KIND "plain" only where the problem goes on."""
    z = (tl.program_id(0) // blocks).to(tl.int64)
    if KIND == "plain":
        going = tl.load(s.state + z * STATE + GOING)
    else:
        going = 1.0
    if going > 0:
        n, _ = sizes_of(p, z)
        first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N
        block = tl.program_id(0).to(tl.int64)
        rows_of(p, s, z, block, first, n + p.has_row, rho_a, KIND, False, BLOCK_N, BLOCK_M)


@triton.jit
def vectors_kernel(
    sums,
    p,
    s,
    squares,
    rho_b,
    most,
    PHASE: tl.constexpr,
    BALANCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What follows a product."""
    z = tl.program_id(0).to(tl.int64)
    if PHASE == "begin":
        begin(p, s, z, sums, squares, rho_b, BALANCED, BLOCK)
    elif PHASE == "start":
        start_steps(p, s, z, sums, BALANCED, BLOCK)
    elif PHASE == "advance":
        if tl.load(s.state + z * STATE + GOING) > 0:
            advance(p, s, z, sums, most, BALANCED, BLOCK)
    elif PHASE == "finish":
        finish(p, s, z, BLOCK)
    else:
        choose(p, s, z, BLOCK)


def by_blocks(p, s: System, rho_a: float, rho_b: float, balanced: bool) -> None:
    """Solves problems that take several programs each."""
    config, of_vectors = (configure(TABLE, s.f.device, name) for name in ("rows", "vectors"))
    B, blocks, M = s.partial.shape
    sums, squares = s.v.new_empty(B, M), s.v.new_empty(B, M)

    def rows(kind: str) -> None:
        launch(rows_kernel, (B * blocks,), config, s.partial, p, s, rho_a, blocks, KIND=kind)
        torch.sum(s.partial, 1, out=sums)
        if kind == "prepare":
            torch.sum(s.squares, 1, out=squares)

    def vectors(phase: str) -> None:
        operands = (sums, p, s, squares, rho_b, float(STEPS))
        launch(vectors_kernel, (B,), of_vectors, *operands, PHASE=phase, BALANCED=balanced)

    rows("prepare")
    vectors("begin")
    rows("gamma")
    vectors("start")
    for _ in range(STEPS):
        rows("plain")
        vectors("advance")
    vectors("finish")
    rows("gamma")
    vectors("choose")


def sinkhorn_backward(*args) -> tuple[Tensor, ...]:
    """(∂C, ∂a, ∂b, ∂ε, ∂border)."""
    f, g, grad_f, grad_g, rho_a, rho_b = args[COUNT:]
    f, g, grad_f, grad_g = (t.contiguous() for t in (f, g, grad_f, grad_g))
    (B, N), M = f.shape, g.shape[1]
    X, Y = f.new_zeros(B, N), g.new_zeros(B, M)
    if X.numel() and Y.numel():
        p, wide = arguments_of(*args[:COUNT]), {"dtype": torch.float64}
        balanced = rho_a == rho_b == torch.inf
        small = M <= LONGEST and N * M <= ENTRIES
        height = configure(TABLE, f.device, "rows").tiles["BLOCK_N"]
        partial = f.new_empty(B, 1 if small else triton.cdiv(N, height), M)
        s = System(
            *(f, g, grad_f, grad_g, f.new_empty(B, N), f.new_empty(B, N, **wide)),
            *(g.new_empty(B, M), X, Y, partial, f.new_empty(partial.shape)),
            f.new_empty(B, conjugate.VECTORS.value, M, **wide),
            f.new_empty(B, STATE.value, **wide),
        )
        if small:
            width = max(16, triton.next_power_of_2(M))
            config = configure(PROBLEM, f.device, max(64, width))
            options = {"BALANCED": balanced, "BLOCK": min(256, width), "BLOCK_M": width}
            launch(problem_kernel, (B,), config, partial, p, s, rho_a, rho_b, **options)
        else:
            by_blocks(p, s, rho_a, rho_b, balanced)
    up = Upstream(None, None, X, Y, rho_a, rho_b)
    return gradients(args[:COUNT], f, g, up, "implicit")


def example_launches(dtype: torch.dtype) -> None:
    """Every form of a problem, in one program and in several."""
    for args in example_problems(dtype):
        f, g = (t.new_empty(t.shape) for t in args[1:3])
        for rho in ((torch.inf, torch.inf), (1.0, 0.5)):
            sinkhorn_backward(*args, f, g, f, g, *rho)
    for M in (16, 100):
        cost = torch.empty(64, 40, M, dtype=dtype, device="meta")
        a, b = (cost.new_empty(64, n, dtype=torch.float32) for n in (40, M))
        rest = (a[:, 0], None, None, None, None, False)
        sinkhorn_backward(cost, a, b, *rest, a, b, a, b, torch.inf, torch.inf)
