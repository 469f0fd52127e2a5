"""Cases of pseudo-labels for imbalanced clusters."""

import math

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_progressive_partial_transport(
    logits,
    mass,
    *,
    epsilon=0.1,
    strength=1.0,
    graph=None,
    graph_strength=0.0,
    max_iterations=1000,
    tolerance=None,
    outer_iterations=100,
    outer_tolerance=1e-6,
):
    """Matrix scaling of the problem with one more column, in the log domain."""
    n, K = logits.shape
    C = -logits.log_softmax(1)
    tolerance = 1e-6 if tolerance is None else tolerance
    target = torch.full_like(logits[0], math.log(mass / K))
    target = torch.cat([target, target.new_tensor([math.log(1 - mass)])]) if mass < 1 else target
    power = torch.full_like(target, strength / (strength + epsilon))
    power[K:] = 1
    plan, log_v = torch.full_like(C, mass / (n * K)), torch.zeros_like(target)
    for _ in range(1 if graph is None else outer_iterations):
        before = plan
        cost = C if graph is None else C - graph_strength * ((graph + graph.mT) @ plan)
        M = -torch.cat([cost, cost.new_zeros(n, len(target) - K)], 1) / epsilon
        for _ in range(max_iterations):
            last = log_v
            log_u = -math.log(n) - (M + log_v).logsumexp(1)
            log_v = power * (target - (M + log_u[:, None]).logsumexp(0))
            if tolerance >= 0 and (log_v.exp() - last.exp()).norm() <= tolerance:
                break
        plan = (M + log_u[:, None] + log_v).exp()[:, :K]
        if outer_tolerance >= 0 and (plan - before).abs().sum() <= outer_tolerance:
            break
    return plan


def _logits(n, K, view=None):
    def make(dtype, device):
        logits = randn(n, K, dtype=torch.float64)
        logits = view(logits) if view else logits
        return (logits.to(device, dtype),)

    return make


def _bad(error, match, logits=(3, 4), dtype=torch.float32, mass=0.5, **options):
    return BadInput(lambda: (torch.zeros(logits, dtype=dtype), mass), error, match, options)


def _labels(n, K, quick=False):
    return Workload(
        f"{n} x {K}, 200 iterations",
        _logits(n, K),
        flops=800.0 * n * K,
        bytes=lambda size: 2 * size * n * K,
        options={"mass": 0.3, "max_iterations": 200, "tolerance": -1.0},
        quick=quick,
    )


FEW = {"epsilon": 0.5, "max_iterations": 10, "tolerance": -1.0}

PROGRESSIVE_PARTIAL_TRANSPORT = OpCases(
    name="progressive_partial_transport",
    plain=plain_progressive_partial_transport,
    samples=[
        Sample("plain", _logits(13, 5), {"mass": 0.3, **FEW}),
        Sample("one_sample", _logits(1, 11), {"mass": 0.3, **FEW}),
        Sample("all_mass", _logits(9, 4), {"mass": 1.0, "strength": 0.5, **FEW}),
        Sample("strided", _logits(26, 22, view=lambda t: t.mT[:, ::2]), {"mass": 0.3, **FEW}),
    ],
    workloads=[_labels(1024, 100, quick=True), _labels(5120, 1000)],
    bad=[
        _bad(ValueError, r"logits must be \(n, K\)", logits=(4,)),
        _bad(TypeError, "logits must be float64", dtype=torch.int64),
        _bad(ValueError, r"mass must be in \(0, 1\]", mass=0.0),
        _bad(ValueError, "epsilon must be > 0", epsilon=0.0),
        _bad(ValueError, "strength must be > 0", strength=-1.0),
        _bad(ValueError, "graph_strength must be", graph=torch.zeros(3, 3)),
        _bad(ValueError, r"graph must be \(3, 3\)", graph=torch.zeros(2, 3), graph_strength=1.0),
        _bad(TypeError, "graph must be", graph=torch.zeros(3, 3).long(), graph_strength=1.0),
    ],
    differentiable=False,
)

CASES = [PROGRESSIVE_PARTIAL_TRANSPORT]
