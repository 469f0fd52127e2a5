"""Sinkhorn's iteration between points, and the linear system of its implicit gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from weft.ops.registration import Op, reference, register_gradient
from weft.ops.transport.points import (
    COUNT,
    SCHEMA,
    arguments_of,
    composed,
    points_of,
    product,
    product_backward,
    save,
    saved,
    softmin,
    spread,
)
from weft.reference.transport import sinkhorn_points as formulas
from weft.reference.transport.dense import marginal_ratio, penalty, weighted
from weft.reference.transport.sinkhorn import Settings, damping, finite, solve, total
from weft.reference.transport.sinkhorn_points import Points, damped, null_vectors

MOST_STEPS = 1000  # of conjugate gradients


def iterate(
    p: Points,
    a: Tensor,
    b: Tensor,
    start: Tensor | None,
    settings: Settings,
    symmetric: bool = False,
    stops: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, g, error and iterations, by soft minima alone."""
    s, args, swapped = settings, arguments_of(p), arguments_of(p.transposed())
    damping_a = damping(s.rho_a, p.epsilon, a.shape[1], False)
    of_rows = lambda g: softmin(*args, g, b)  # noqa: E731
    if symmetric:
        return formulas.solve_symmetric(of_rows, a, p.epsilon, damping_a, start, s, stops)
    of_columns = lambda f: softmin(*swapped, f, a)  # noqa: E731
    damping_b = damping(s.rho_b, p.epsilon, b.shape[1], False)
    return solve(of_rows, of_columns, a, b, p.epsilon, damping_a, damping_b, start, s, stops)


def dual_value(
    epsilon: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, rho_a: float, rho_b: float
) -> Tensor:
    """The dual objective (dense.py), where g is the column update of f."""
    of_a, of_b = weighted(a, penalty(f, rho_a, False)), weighted(b, penalty(g, rho_b, False))
    mass = weighted(b, marginal_ratio(g, rho_b, False))
    return of_a + of_b + epsilon * (total(a) * total(b) - mass)


def _run(*args):
    a, b, start, rho_a, rho_b, max_iterations, tolerance, relax, symmetric = args[COUNT:]
    p, settings = points_of(args), Settings(rho_a, rho_b, max_iterations, tolerance, relax)
    f, g, error, iterations = iterate(p, a, b, start, settings, symmetric)
    value = dual_value(p.epsilon, a, b, f, g, rho_a, rho_b)
    return tuple(t.contiguous() for t in (value, f, g, error, iterations))


def _fake(*args):
    epsilon, (a, b) = args[2], args[COUNT : COUNT + 2]
    value, f, g = epsilon.new_empty(epsilon.shape), a.new_empty(a.shape), b.new_empty(b.shape)
    iterations = epsilon.new_empty(epsilon.shape, dtype=torch.int64)
    return value, f, g, epsilon.new_empty(epsilon.shape), iterations


forward = Op(
    "sinkhorn_points",
    f"({SCHEMA}, Tensor a, Tensor b, Tensor? start, float rho_a, float rho_b, int max_iterations, "
    "float tolerance, bool relax, bool symmetric) -> "
    "(Tensor value, Tensor f, Tensor g, Tensor error, Tensor iterations)",
    family="transport",
    fake=_fake,
    implementations=[*composed(_run), reference(_run)],
)


def solved(
    p: Points, a: Tensor, b: Tensor, start: Tensor | None, s: Settings, symmetric: bool = False
) -> tuple[Tensor, ...]:
    """value, f, g, error and iterations of a checked problem."""
    numbers = (s.rho_a, s.rho_b, s.max_iterations, s.tolerance, s.relax, symmetric)
    return forward(*arguments_of(p), a, b, start, *numbers)


def _setup(ctx, inputs, output):
    _, f, g, error, iterations = output
    ctx.mark_non_differentiable(error, iterations)
    ctx.set_materialize_grads(False)
    save(ctx, inputs, *inputs[COUNT : COUNT + 2], f, g)
    ctx.rho = inputs[COUNT + 3 : COUNT + 5]


def _gradient(ctx, grad_value, grad_f, grad_g, *_):
    args, tensors = saved(ctx)
    grads = None
    if grad_value is not None:
        grads = of_value(args, *tensors, grad_value, *ctx.rho)
    if grad_f is not None or grad_g is not None:
        *_, f, g = tensors
        grad_f = torch.zeros_like(f) if grad_f is None else grad_f
        grad_g = torch.zeros_like(g) if grad_g is None else grad_g
        more = of_potentials(args, *tensors, grad_f, grad_g, *ctx.rho)
        grads = more if grads is None else tuple(map(torch.add, grads, more))
    if grads is None:
        return (None,) * (COUNT + 9)
    return (*spread(*grads[:3]), *grads[3:], *[None] * 7)


def of_value(
    args: tuple,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    grad: Tensor,
    rho_a: float,
    rho_b: float,
) -> tuple[Tensor, ...]:
    """The envelope's gradient (gradients.value_backward) of x, y, ε, a and b."""
    epsilon, wide = args[2], grad[:, None]
    eps, left, right = epsilon[:, None], (wide * a)[..., None], b[..., None]
    of = product_backward(*args, f, g, right, left)
    of_columns, of_rows = of[5][..., 0], of[6][..., 0]
    mass_a, mass_b = total(a), total(b)
    grad_a = wide * (finite(penalty(f, rho_a, False)) + eps * (mass_b[:, None] - of_rows))
    grad_b = wide * (finite(penalty(g, rho_b, False)) + eps * mass_a[:, None]) - eps * of_columns
    moved = total(a * of_rows)
    return (
        -eps[..., None] * of[0],
        -eps[..., None] * of[1],
        -epsilon * of[2] + grad * (mass_a * mass_b - moved),
        torch.where(f.isinf(), 0, grad_a),
        torch.where(g.isinf(), 0, grad_b),
    )


def of_potentials(
    args: tuple,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
    rho_a: float,
    rho_b: float,
) -> tuple[Tensor, ...]:
    """The implicit gradient (gradients.sinkhorn_backward) of x, y, ε, a and b: −ε times that of Q
    with L_i = (X_i, a_i) and R_j = (b_j, Y_j)."""
    # A potential of −∞ stays there.
    grad_f, grad_g = torch.where(f.isinf(), 0, grad_f), torch.where(g.isinf(), 0, grad_g)
    X, Y = system(*args, a, b, f, g, grad_f, grad_g, rho_a, rho_b)
    of = product_backward(*args, f, g, torch.stack([b, Y], 2), torch.stack([X, a], 2))
    epsilon = args[2]
    eps = epsilon[:, None]
    return (
        -eps[..., None] * of[0],
        -eps[..., None] * of[1],
        -epsilon * of[2],
        -eps * of[6][..., 1],
        -eps * of[5][..., 0],
    )


register_gradient(forward, _setup, _gradient)


def _fake_system(*args):
    a, b = args[COUNT : COUNT + 2]
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _reference_system(*args):
    return apart_in_memory(*formulas.solve_system(points_of(args), *args[COUNT:]))


def apart_in_memory(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Copies, as both may be parts of one tensor."""
    row_major = torch.contiguous_format
    return X.clone(memory_format=row_major), Y.clone(memory_format=row_major)


def _conjugate_gradients(*args):
    """On the Schur complement of Y, made symmetric by q = √(b / diagonal): z with Y = q z.

    (1 − q eᵀ (a / R) e q) z = (δ − b eᵀ (γ / R)) / √(b C),   X = (γ − a e Y) / R

    where R and C are the diagonals. Columns without weight have Y = δ / C, for all others known."""
    a, b, f, g, grad_f, grad_g, rho_a, rho_b = args[COUNT:]
    args, swapped = args[:COUNT], arguments_of(points_of(args).transposed())
    of_rows = lambda v: product(*args, f, g, v[..., None])[..., 0]  # noqa: E731
    of_columns = lambda v: product(*swapped, g, f, v[..., None])[..., 0]  # noqa: E731
    R, C = damped(of_rows(b), rho_a, args[2]), damped(of_columns(a), rho_b, args[2])
    balanced, sizes = rho_a == rho_b == torch.inf, [a.shape[1], b.shape[1]]
    if balanced:
        null, ones = null_vectors(a, b)
        both = torch.cat([grad_f, grad_g], 1)
        apart = (ones * both).sum(1, keepdim=True)
        grad_f, grad_g = (both - apart * null).split(sizes, 1)
    some = b > 0
    known = torch.where(some, 0, grad_g / C)
    right = grad_g - b * of_columns((grad_f - a * of_rows(known)) / R)
    root = (b * C).sqrt()
    right = torch.where(some, right / torch.where(some, root, 1), 0)
    q = (b / C).sqrt()
    apply = lambda z: z - q * of_columns(a / R * of_rows(q * z))  # noqa: E731
    z = solved_by_gradients(apply, right, root if balanced else None)
    Y = known + q * z
    X = (grad_f - a * of_rows(Y)) / R
    if balanced:
        both = torch.cat([X, Y], 1)
        X, Y = (both + (apart - (ones * both).sum(1, keepdim=True)) * null).split(sizes, 1)
    return apart_in_memory(X, Y)


def solved_by_gradients(
    apply: Callable[[Tensor], Tensor], right: Tensor, null: Tensor | None
) -> Tensor:
    """z with ``apply(z)`` = right, by conjugate gradients, each problem until it is met; orthogonal
    to ``null``."""

    def dot(one: Tensor, two: Tensor) -> Tensor:
        return (one.double() * two.double()).sum(1, keepdim=True)

    def without_null(v: Tensor) -> Tensor:
        if null is None:
            return v
        squares = dot(null, null)
        return v - (dot(null, v) / torch.where(squares > 0, squares, 1)).to(v.dtype) * null

    residual = without_null(right)
    z, direction, size = torch.zeros_like(right), residual, dot(residual, residual)
    enough = size * (8 * torch.finfo(right.dtype).eps) ** 2
    for _ in range(MOST_STEPS):
        active = size > enough
        if not active.any():
            break
        moved = without_null(apply(direction))
        curvature = dot(direction, moved)
        active = active & (curvature > 0)
        step = torch.where(active, size / torch.where(active, curvature, 1), 0).to(z.dtype)
        z, residual = z + step * direction, residual - step * moved
        after = dot(residual, residual)
        grown = torch.where(active, after / torch.where(size > 0, size, 1), 0).to(z.dtype)
        direction, size = residual + grown * direction, torch.where(active, after, 0)
    return z


system = Op(
    "points_system",
    f"({SCHEMA}, Tensor a, Tensor b, Tensor f, Tensor g, Tensor grad_f, Tensor grad_g, "
    "float rho_a, float rho_b) -> (Tensor X, Tensor Y)",
    family="transport",
    fake=_fake_system,
    implementations=[*composed(_conjugate_gradients), reference(_reference_system)],
)


def _setup_system(ctx, inputs, output):
    save(ctx, inputs, *inputs[COUNT : COUNT + 4], *output)
    ctx.rho = inputs[-2:]


def _system_gradient(ctx, grad_X, grad_Y):
    """With the adjoint solution z, Hᵀ z = (∂X, ∂Y): ∂(γ, δ) = z, and the rest is the derivative of
    −⟨z, H (X, Y)⟩ = −Q with

    L_i = (λ_a z_i X_i, z_i a_i, a_i, X_i)      R_j = (b_j, Y_j, λ_b z_j Y_j, z_j b_j)

    where here λ = 1 + ε/ρ."""
    args, (a, b, f, g, X, Y) = saved(ctx)
    (rho_a, rho_b), epsilon = ctx.rho, args[2]
    z, w = adjoint_solution(args, a, b, f, g, grad_X, grad_Y, rho_a, rho_b)
    of_a, of_b = ((1 + epsilon / rho)[:, None] for rho in ctx.rho)
    left = torch.stack([of_a * z * X, z * a, a, X], 2)
    right = torch.stack([b, Y, of_b * w * Y, w * b], 2)
    of = product_backward(*args, f, g, right, -left)
    of_left, of_right = -of[6], of[5]
    grad_a = of_left[..., 1] * z + of_left[..., 2]
    grad_b = of_right[..., 0] + of_right[..., 3] * w
    grad_epsilon = of[2]
    if rho_a < torch.inf:
        grad_epsilon = grad_epsilon + (of_left[..., 0] * z * X).sum(1) / rho_a
    if rho_b < torch.inf:
        grad_epsilon = grad_epsilon + (of_right[..., 2] * w * Y).sum(1) / rho_b
    return (*spread(of[0], of[1], grad_epsilon), grad_a, grad_b, of[3], of[4], z, w, None, None)


def adjoint_solution(
    args: tuple,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    grad_X: Tensor,
    grad_Y: Tensor,
    rho_a: float,
    rho_b: float,
) -> tuple[Tensor, Tensor]:
    """z with Hᵀ z = (∂X, ∂Y). As H diag(a, b) = diag(a, b) Hᵀ, the system itself with
    (a ∂X, b ∂Y) gives diag(a, b) z, from which one step gives z without a division by weights."""
    swapped = arguments_of(points_of(args).transposed())
    balanced = rho_a == rho_b == torch.inf
    if balanced:
        null, ones = null_vectors(a, b)
        both = torch.cat([grad_X, grad_Y], 1)
        along = (null * both).sum(1, keepdim=True)
        grad_X, grad_Y = (both - along * ones).split([a.shape[1], b.shape[1]], 1)
    _, u = system(*args, a, b, f, g, a * grad_X, b * grad_Y, rho_a, rho_b)
    sums, moved = product(*args, f, g, torch.stack([b, u], 2)).unbind(2)
    z = (grad_X - moved) / damped(sums, rho_a, args[2])
    sums, moved = product(*swapped, g, f, torch.stack([a, a * z], 2)).unbind(2)
    w = (grad_Y - moved) / damped(sums, rho_b, args[2])
    if balanced:
        both = torch.cat([z, w], 1)
        both = both + (along - (null * both).sum(1, keepdim=True)) * ones
        z, w = both.split([a.shape[1], b.shape[1]], 1)
    return z, w


register_gradient(system, _setup_system, _system_gradient)
