"""Peers of the transport family, each with the arguments of our function."""

from collections.abc import Callable

import torch
from torch import Tensor

from weft.benchmarks.providers import Peer

NO_STOP = 0.0  # a tolerance that no iteration meets


def uniform_only(cost: Tensor, a, b, tolerance: float | None, options: dict) -> None:
    """The peers are compared on balanced problems with uniform weights and fixed iterations."""
    ours_alone = [name for name, value in options.items() if value is not None]
    if a is not None or b is not None or tolerance is None or tolerance >= 0 or ours_alone:
        raise NotImplementedError("compared with uniform weights and a number of iterations")
    if cost.dim() != 3:
        raise NotImplementedError("compared on batches")


def as_ours(plan: Tensor, log_u: Tensor, log_v: Tensor, epsilon: float) -> tuple[Tensor, ...]:
    """Value, plan and potentials from P = diag(u) e^(−C / ε) diag(v) with uniform weights."""
    N, M = plan.shape[1:]
    f = epsilon * (log_u + torch.log(torch.tensor(float(N))))
    g = epsilon * (log_v + torch.log(torch.tensor(float(M))))
    shift = (g.mean(1, keepdim=True) - f.mean(1, keepdim=True)) / 2
    return f.mean(1) + g.mean(1), plan, f + shift, g - shift


def pot_batched(method: str) -> Callable:
    """ot.solve_batch on torch tensors."""
    import ot

    def sinkhorn(cost, a=None, b=None, *, epsilon, max_iterations=1000, tolerance=None, **options):
        uniform_only(cost, a, b, tolerance, options)
        found = ot.solve_batch(
            cost,
            reg=epsilon,
            max_iter=max_iterations,
            tol=NO_STOP,
            method=method,
            grad="autodiff" if cost.requires_grad else "detach",
        )
        u, v = found.potentials
        if method == "sinkhorn":
            u, v = u.log(), v.log()
        return as_ours(found.plan, u, v, epsilon)

    return sinkhorn


def pot_numpy() -> Callable:
    """ot.sinkhorn on NumPy arrays, one problem after the other: matrix products with e^(−C / ε)."""
    import ot

    def sinkhorn(cost, a=None, b=None, *, epsilon, max_iterations=1000, tolerance=None, **options):
        uniform_only(cost, a, b, tolerance, options)
        if cost.requires_grad or cost.dtype not in (torch.float32, torch.float64):
            raise NotImplementedError("NumPy: float32 and float64, no gradients")
        found = []
        for C in cost.numpy():
            plan, log = ot.sinkhorn(
                [], [], C, epsilon, numItermax=max_iterations, stopThr=NO_STOP, log=True, warn=False
            )
            found.append([torch.as_tensor(t) for t in (plan, log["u"], log["v"])])
        plan, u, v = (torch.stack(parts).to(cost.dtype) for parts in zip(*found, strict=True))
        return as_ours(plan, u.log(), v.log(), epsilon)

    return sinkhorn


def ott_jax() -> Callable:
    """OTT's log-domain solver, vectorised over the batch and compiled by XLA."""
    import jax
    from jax import numpy as jnp
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    compiled: dict = {}

    def solver(epsilon: float, iterations: int) -> Callable:
        def one(C):
            options = dict(threshold=0.0, min_iterations=iterations, max_iterations=iterations)
            found = Sinkhorn(lse_mode=True, **options)(LinearProblem(Geometry(C, epsilon=epsilon)))
            return found.matrix, found.f / epsilon, found.g / epsilon

        return jax.jit(jax.vmap(one))

    def sinkhorn(cost, a=None, b=None, *, epsilon, max_iterations=1000, tolerance=None, **options):
        uniform_only(cost, a, b, tolerance, options)
        if cost.requires_grad or cost.dtype != torch.float32:
            raise NotImplementedError("compared in float32, without gradients")
        key = (epsilon, max_iterations)
        run = compiled.setdefault(key, solver(*key))
        plan, u, v = (torch.from_dlpack(t.copy()) for t in run(jnp.asarray(cost.numpy())))
        return as_ours(plan, u, v, epsilon)

    return sinkhorn


def pot_assignments() -> Callable:
    """ot.sinkhorn for a fixed number of iterations: columns, then rows, to 1/M and 1/N."""
    import ot

    def doubly_stochastic(
        scores, iterations, *, epsilon=1.0, last="rows", stabilizer=0.0, group=None
    ):
        if scores.dim() != 2 or last != "rows" or stabilizer or group is not None:
            raise NotImplementedError("one matrix, rows last, no stabilizer")
        if scores.requires_grad or scores.dtype not in (torch.float32, torch.float64):
            raise NotImplementedError("NumPy: float32 and float64, no gradients")
        options = {"numItermax": iterations, "stopThr": NO_STOP, "warn": False}
        plan = ot.sinkhorn([], [], -scores.numpy(), epsilon, **options)
        return torch.as_tensor(len(scores) * plan)

    return doubly_stochastic


PEERS = [
    Peer("pot numpy", "doubly_stochastic", "ot", "pot", pot_assignments),
    Peer("pot", "sinkhorn", "ot", "pot", lambda: pot_batched("log_sinkhorn")),
    Peer("pot scaling", "sinkhorn", "ot", "pot", lambda: pot_batched("sinkhorn")),
    Peer("pot numpy", "sinkhorn", "ot", "pot", pot_numpy),
    Peer("ott", "sinkhorn", "ott", "ott-jax", ott_jax),
]
