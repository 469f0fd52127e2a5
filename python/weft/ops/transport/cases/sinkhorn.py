"""Cases of transport with a matrix of costs.

Samples run so many iterations that their rounding is all that is left of the error.
"""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn
from weft.ops.transport.result import Transport


def plain_sinkhorn(
    cost,
    a=None,
    b=None,
    *,
    epsilon,
    max_iterations=1000,
    tolerance=None,
    mask=None,
    lengths=None,
    rho=None,
    mass=None,
    dustbin=None,
    potentials=None,
    acceleration="auto",
    schedule="fixed",
    gradient="implicit",
):
    """Log-sum-exp by log-sum-exp, with the gradient of every iteration."""
    if cost.dim() == 2:
        options = dict(lengths=lengths, rho=rho, mass=mass, dustbin=dustbin, mask=mask)
        loop = dict(epsilon=epsilon, max_iterations=max_iterations, tolerance=tolerance)
        found = plain_sinkhorn(cost[None], a, b, **options, **loop)
        return tuple(t[0] for t in found)
    B, N, M = cost.shape
    dtype = torch.float64 if cost.dtype == torch.float64 else torch.float32
    C = cost.to(dtype)
    uniform = lambda n: cost.new_full((n,), 1 / max(n, 1), dtype=dtype)  # noqa: E731
    a = (uniform(N) if a is None else a).to(dtype).expand(B, N)
    b = (uniform(M) if b is None else b).to(dtype).expand(B, M)
    if lengths is not None:
        rows, columns = (
            torch.arange(n, device=cost.device) < real[:, None]
            for n, real in zip((N, M), lengths, strict=True)
        )
        C = C.masked_fill(~(rows[:, :, None] & columns[:, None]), torch.inf)
        a, b = (w * r / (w * r).sum(1, keepdim=True) for w, r in ((a, rows), (b, columns)))
    if rho is None and mass is None:
        b = b * (a.sum(1) / b.sum(1))[:, None]
    if mask is not None:
        C = C.masked_fill(~mask, torch.inf)
    if dustbin is not None or mass is not None:
        side = torch.as_tensor(0.0 if dustbin is None else dustbin, dtype=dtype).reshape(-1, 1, 1)
        corner = side if mass is None else torch.full_like(side, torch.inf)
        C = torch.cat([C, side.expand(B, N, 1)], 2)
        C = torch.cat([C, torch.cat([side.expand(B, 1, M), corner.expand(B, 1, 1)], 2)], 1)
        kept = 0 if mass is None else mass
        more_a, more_b = b.sum(1, keepdim=True) - kept, a.sum(1, keepdim=True) - kept
        a, b = torch.cat([a, more_a], 1), torch.cat([b, more_b], 1)
    rho_a, rho_b = rho if isinstance(rho, tuple) else (rho, rho)
    eps = torch.as_tensor(epsilon).to(dtype).reshape(-1, 1)
    damp_a = 1 if rho_a is None else rho_a / (rho_a + eps)
    damp_b = 1 if rho_b is None else rho_b / (rho_b + eps)
    log_a, log_b = a.log(), b.log()
    f, g = torch.zeros_like(a), torch.zeros_like(b)

    def softmin(x):
        hidden = (x == -torch.inf).all(2, keepdim=True)
        total = torch.logsumexp(torch.where(hidden, 0, x), 2, keepdim=True)
        return torch.where(hidden, torch.inf, -eps[..., None] * total)[..., 0]

    for _ in range(max_iterations):
        f = damp_a * softmin(log_b[:, None] + (g[:, None] - C) / eps[..., None])
        f = torch.where(f == torch.inf, -torch.inf, f)
        g = damp_b * softmin(log_a[:, None] + (f[:, None] - C.mT) / eps[..., None])
        g = torch.where(g == torch.inf, -torch.inf, g)
    some_f, some_g = f.isfinite() & (a > 0), g.isfinite() & (b > 0)
    weigh = lambda w, p, some: torch.where(some, w * torch.where(some, p, 0), 0).sum(1)  # noqa: E731
    if rho is None:
        shift = (weigh(b, g, some_g) - weigh(a, f, some_f)) / (a.sum(1) + b.sum(1)).clamp_min(1e-9)
        f = torch.where(f.isinf(), f, f + shift[:, None])
        g = torch.where(g.isinf(), g, g - shift[:, None])
    hidden = C == torch.inf
    exponent = (f[:, :, None] + g[:, None] - torch.where(hidden, 0, C)) / eps[..., None]
    P = torch.where(hidden, 0, a[:, :, None] * b[:, None] * torch.where(hidden, 0, exponent).exp())
    penalty = lambda p, r: p if r is None else -r * torch.expm1(-p / r)  # noqa: E731
    value = weigh(a, penalty(f, rho_a), some_f) + weigh(b, penalty(g, rho_b), some_g)
    value = value + eps[:, 0] * (a.sum(1) * b.sum(1) - P.sum((1, 2)))
    return value, P[:, :N, :M].to(cost.dtype) if mass is not None else P.to(cost.dtype), f, g


def result(found):
    """Value, plan and potentials."""
    if not isinstance(found, Transport):
        return found
    return found.value, found.plan, *found.potentials


def problems(*shape, weights=False, last=None, view=lambda C: C):
    """Costs; with ``weights`` also marginals of one mass, with ``last`` one number more."""

    def make(dtype, device):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        args = [view(randn(*shape, dtype=dtype, device=device))]
        if weights:
            for seed, n in enumerate(shape[-2:]):
                logits = randn(*shape[:-2], n, dtype=torch.float64, seed=seed + 1)
                args.append(logits.softmax(-1).to(device, wide))
        if last is not None:
            args.append(torch.tensor(last, device=device, dtype=wide))
        return tuple(args)

    return make


def dear(C):
    """Costs around 3, so that the value is not the small difference of larger numbers."""
    return C + 3


LOOP = {"max_iterations": 14, "tolerance": -1.0}
EXACT = {"epsilon": 3.0, **LOOP}
SHARP = {"epsilon": 1.0, "max_iterations": 40, "tolerance": -1.0}
EPSILONS = [3.2, 2.8, 3.5, 4.1]
DUSTBINS = [0.3, 0.7, -0.2, 1.1, 0.5, 0.9]
RAGGED = {"lengths": (torch.tensor([4, 6, 1]), torch.tensor([7, 3, 5]))}
HOLES = torch.rand(6, 7, generator=torch.Generator().manual_seed(3)) < 0.8
HOLES[:, 0] = HOLES[0] = True

SAMPLES = [
    Sample("plain", problems(2, 5, 7), EXACT),
    Sample("prime", problems(1, 19, 67), EXACT),
    Sample("one", problems(3, 1, 1), EXACT),
    Sample("strided", problems(2, 9, 8, view=lambda C: C[:, ::2].mT), EXACT),
    Sample("no_rows", problems(2, 0, 3), EXACT),
    Sample("weights", problems(4, 9, 12, weights=True, last=EPSILONS), LOOP, keywords=("epsilon",)),
    Sample("single", problems(5, 4, weights=True), EXACT),
    Sample("unbalanced", problems(3, 17, 23, weights=True, view=dear), SHARP | {"rho": (1.5, 1.0)}),
    Sample("semi_relaxed", problems(2, 4, 5, weights=True), SHARP | {"rho": (None, 0.7)}),
    Sample("ragged", problems(3, 6, 7), SHARP | RAGGED | {"mask": HOLES}),
    Sample("dustbin", problems(6, 4, 6, last=DUSTBINS), EXACT, keywords=("dustbin",)),
    Sample("partial", problems(4, 5, 4, weights=True, view=dear), SHARP | {"mass": 0.4}),
    Sample("unrolled", problems(2, 5, 6, weights=True), EXACT | {"gradient": "unrolled"}),
]


def bad(error, match, make=lambda: (torch.ones(2, 3, 4),), **options):
    return BadInput(make, error, match, {"epsilon": 1.0} | options)


def with_weights(a, b):
    return lambda: (torch.ones(3, 4), torch.tensor(a), torch.tensor(b))


def _workload(B, N, M, epsilon, iterations, quick=False):
    entries = float(B * N * M)
    return Workload(
        f"B={B} N={N} M={M} eps={epsilon} iterations={iterations}",
        lambda dtype, device: (torch.rand(B, N, M, generator=_seed()).to(device, dtype),),
        flops=20 * entries * iterations,  # an exponential in polynomial form, sums
        backward_flops=8 * entries * 20,
        bytes=lambda size: size * 2 * entries,
        options={"epsilon": epsilon, "max_iterations": iterations, "tolerance": -1.0},
        quick=quick,
    )


def _seed():
    return torch.Generator().manual_seed(0)


SINKHORN = OpCases(
    name="sinkhorn",
    plain=plain_sinkhorn,
    result=result,
    samples=SAMPLES,
    workloads=[
        _workload(8, 128, 128, 0.05, 100, quick=True),
        _workload(64, 256, 256, 0.05, 100),
        _workload(1, 2048, 2048, 0.05, 100),
    ],
    bad=[
        bad(TypeError, "cost must be float64", lambda: (torch.ones(3, 4, dtype=torch.int64),)),
        bad(ValueError, r"cost must be \(B, N, M\)", lambda: (torch.ones(3),)),
        bad(ValueError, "a must be", lambda: (torch.ones(3, 4), torch.ones(4))),
        bad(
            TypeError,
            "b must have the dtype",
            lambda: (torch.ones(3, 4), None, torch.ones(4).int()),
        ),
        bad(ValueError, "a must be finite", with_weights([1.0, -1.0, 1.0], [0.25] * 4)),
        bad(
            ValueError,
            "b must be finite",
            with_weights([1.0, 1.0, 1.0], [1.0, 1.0, 1.0, torch.nan]),
        ),
        bad(ValueError, "the same mass", with_weights([1.0, 1.0, 1.0], [1.0] * 4)),
        bad(ValueError, "epsilon must be > 0", epsilon=0.0),
        bad(ValueError, "epsilon must be > 0", epsilon=torch.tensor(-1.0)),
        bad(ValueError, "max_iterations must be", max_iterations=0),
        bad(ValueError, "rho must be > 0", rho=(None, 0.0)),
        bad(ValueError, "mass must be at most", mass=2.0),
        bad(ValueError, "exclude each other", mass=0.5, dustbin=1.0),
        bad(ValueError, "mass goes with rho=None", mass=0.5, rho=1.0),
        bad(ValueError, r"lengths: rows must be in \[0, 3\]", lengths=(torch.tensor([1, 4]), None)),
        bad(TypeError, "lengths must be a pair", lengths=torch.tensor([1, 2])),
        bad(TypeError, "mask must be a bool", mask=torch.ones(3, 4)),
        bad(ValueError, "mask must be broadcastable", mask=torch.ones(3, dtype=torch.bool)),
        bad(ValueError, "potentials: f must be", potentials=(torch.ones(2), torch.ones(2, 4))),
        bad(ValueError, "schedule must be", schedule="slow"),
        bad(ValueError, "acceleration must be", acceleration="more"),
        bad(ValueError, "tolerance must be None", gradient="unrolled", tolerance=1e-3),
        bad(ValueError, "gradient must be", gradient="envelope"),
    ],
)

CASES = [SINKHORN]
