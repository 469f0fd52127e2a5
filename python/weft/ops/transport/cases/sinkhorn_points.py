"""Cases of transport between points."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn
from weft.ops.transport.problem import wide_dtype
from weft.ops.transport.result import Transport


def plain_costs(x, y, cost):
    if cost in ("dot", "cosine"):
        if cost == "cosine":
            x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
        return float(cost == "cosine") - x @ y.mT
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    return squares if cost == "sqeuclidean" else squares.clamp_min(1e-30).sqrt()


def plain_sinkhorn_points(
    x,
    y,
    a=None,
    b=None,
    *,
    cost="sqeuclidean",
    epsilon,
    max_iterations=1000,
    tolerance=None,
    lengths=None,
    rho=None,
    potentials=None,
    acceleration="auto",
    schedule="fixed",
    gradient="implicit",
    memory_budget=None,
    precision="fp32",
):
    """The matrix of costs by expanded squares, ``max_iterations`` updates in the log domain."""
    wide = wide_dtype(x)
    x, y = (
        t.to(wide) if n is None else torch.where(first(n, t.shape[-2])[..., None], t, 0).to(wide)
        for t, n in zip((x, y), lengths or (None, None), strict=True)
    )
    C = plain_costs(x, y, cost)
    N, M = C.shape[-2:]
    weights = []
    for weight, n, side in zip((a, b), lengths or (None, None), (N, M), strict=True):
        if weight is None:
            count = C.new_tensor(max(side, 1)) if n is None else n[:, None]
            weight = torch.ones(C.shape[:-2] + (side,), dtype=wide, device=C.device) / count
        if n is not None:
            weight = torch.where(first(n, side), weight, 0)
        weights.append(weight.to(wide))
    a, b = weights
    rho_a, rho_b = rho if isinstance(rho, tuple) else (rho, rho)
    if rho is None:
        b = b * (a.sum(-1) / b.sum(-1))[..., None]
    eps = torch.as_tensor(epsilon, dtype=wide, device=C.device)
    eps = eps[..., None] if eps.dim() else eps
    damping_a, damping_b = (1.0 if r is None else r / (r + eps) for r in (rho_a, rho_b))
    log_a, log_b = (torch.where(w > 0, w.clamp_min(1e-300).log(), -torch.inf) for w in (a, b))
    C_eps = C / eps[..., None] if eps.dim() else C / eps
    g = b * 0
    for _ in range(max_iterations):
        sums = torch.logsumexp((log_b + g / eps)[..., None, :] - C_eps, -1)
        f = -damping_a * eps * sums
        g = -damping_b * eps * torch.logsumexp((log_a + f / eps)[..., None] - C_eps, -2)
    if rho is None:
        shift = ((b * g).sum(-1) - (a * f).sum(-1)) / (a.sum(-1) + b.sum(-1))
        f, g = f + shift[..., None], g - shift[..., None]
    penalty = lambda p, r: p if r is None else r * (1 - (-p / r).exp())  # noqa: E731
    P = (
        a[..., None]
        * b[..., None, :]
        * ((f[..., None] + g[..., None, :]) / eps_of(eps) - C_eps).exp()
    )
    mass = a.sum(-1) * b.sum(-1) - P.sum((-1, -2))
    of_eps = eps[..., 0] if eps.dim() else eps
    value = (a * penalty(f, rho_a)).sum(-1) + (b * penalty(g, rho_b)).sum(-1) + of_eps * mass
    f, g = (
        p if n is None else torch.where(first(n, p.shape[-1]), p, -torch.inf)
        for p, n in zip((f, g), lengths or (None, None), strict=True)
    )
    return value, f, g, P @ numbers(g.detach())


def first(count, side):
    return torch.arange(side, device=count.device) < count[:, None]


def numbers(g):
    """Values for ``apply``, (..., M, 1): 1, 2, ..., M."""
    return torch.ones_like(g)[..., None].cumsum(-2)


def result(found):
    """Value, potentials, and the plan's product with numbers."""
    if not isinstance(found, Transport):
        return found
    return found.value, *found.potentials, found.apply(numbers(found.potentials[1]))


def eps_of(eps):
    return eps[..., None] if eps.dim() else eps


def clouds(B, N, M, D, *, weights=True, epsilon=1.0, scale=0.5, view=None):
    """x, y and, with weights, a and b of one mass, and ε."""

    def make(dtype, device):
        batch = () if B is None else (B,)
        x = (scale * randn(*batch, N, D, dtype=torch.float64)).to(device, dtype)
        y = (scale * randn(*batch, M, D, dtype=torch.float64, seed=1) + 0.25).to(device, dtype)
        x, y = view(x, y) if view else (x, y)
        eps = torch.tensor(epsilon, dtype=wide_dtype(x), device=device)
        if not weights:
            return x, y, eps
        a, b = (randn(*batch, n, dtype=torch.float64, seed=n).abs() + 0.1 for n in (N, M))
        a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
        return x, y, a.to(device, wide_dtype(x)), b.to(device, wide_dtype(x)), eps

    return make


WEIGHTED = ("a", "b", "epsilon")
FIXED = {"max_iterations": 40, "tolerance": -1.0}
STREAMED = {**FIXED, "memory_budget": 0}


def sample(
    name,
    B,
    N,
    M,
    D,
    keywords=WEIGHTED,
    *,
    epsilon=1.0,
    view=None,
    given=STREAMED,
    interpreted=False,
    **options,
):
    make = clouds(B, N, M, D, weights=keywords == WEIGHTED, epsilon=epsilon, view=view)
    return Sample(name, make, {**given, **options}, keywords=keywords, interpreted=interpreted)


def padded(x, y):
    """Garbage beyond the lengths."""
    x, y = (
        torch.where(first(n, t.shape[1])[..., None].to(t.device), t, torch.nan)
        for n, t in zip(LENGTHS, (x, y), strict=True)
    )
    return x, y


LENGTHS = (torch.tensor([3, 5, 11, 8, 10, 1]), torch.tensor([13, 4, 9, 12, 5, 7]))
RAGGED = {"lengths": LENGTHS, "epsilon": [1.0, 1.4, 0.8, 1.2, 0.9, 1.1], "view": padded}

SAMPLES = [
    sample("plain", 2, 17, 21, 3, ("epsilon",)),
    sample("products", 1, 5, 18, 9, epsilon=2.0, acceleration="none"),
    sample("cosine", 2, 17, 21, 5, cost="cosine", rho=1.0),
    sample("dot", None, 31, 23, 4, cost="dot", rho=(None, 0.5)),
    sample("euclidean", 6, 11, 13, 9, ("epsilon",), cost="euclidean", **RAGGED),
    sample("matrix", 2, 13, 21, 3, memory_budget=1 << 20),
    sample("no_rows", 2, 0, 3, 4, ("epsilon",)),
    sample("few_steps", 1, 12, 13, 9, epsilon=8.0, max_iterations=8, interpreted=True),
]


def bad(error, match, x=(2, 5, 3), y=(2, 6, 3), dtype=torch.float32, **options):
    make = lambda: (torch.ones(x, dtype=dtype), torch.ones(y))  # noqa: E731
    return BadInput(make, error, match, {"epsilon": 1.0, **options})


BAD = [
    bad(ValueError, r"x must be \(B, N, D\)", x=(7,)),
    bad(ValueError, r"y must be \(2, M, 3\)", y=(2, 6, 4)),
    bad(ValueError, r"y must be \(2, M, 3\)", y=(6, 3)),
    bad(TypeError, "y must have the dtype of x", dtype=torch.float64),
    bad(ValueError, "cost must be one of", cost="l1"),
    bad(ValueError, "precision must be one of", precision="bf16"),
    bad(ValueError, "epsilon must be > 0", epsilon=0.0),
    bad(ValueError, "same mass", a=torch.ones(5), b=torch.ones(6)),
]


def workload(N, M, D, iterations, quick=False, given=STREAMED, **options):
    return Workload(
        f"{N}x{M} D={D}",
        clouds(None, N, M, D, weights=False, epsilon=0.1 * D),
        flops=4.0 * N * M * (D + 1) * iterations,
        backward_flops=8.0 * N * M * D,
        bytes=lambda size: size * (N + M) * (D + 1),
        options={**given, "max_iterations": iterations, **options},
        quick=quick,
        keywords=("epsilon",),
    )


SINKHORN_POINTS = OpCases(
    name="sinkhorn_points",
    plain=plain_sinkhorn_points,
    samples=SAMPLES,
    workloads=[
        workload(500, 700, 16, 10, quick=True),
        workload(4096, 4096, 64, 10),
        workload(10000, 10000, 512, 10, memory_budget=1 << 29),
    ],
    bad=[*BAD, bad(ValueError, "memory_budget must be", memory_budget=-1)],
    result=result,
)

CASES = [SINKHORN_POINTS]
