"""The part of a schema that the ops on cost matrices share, and the checks of its arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.ops.checks import check_float, values_are_checked
from weft.reference.transport.dense import Problem
from weft.reference.transport.sinkhorn import total

SCHEMA = (
    "Tensor cost, Tensor a, Tensor b, Tensor epsilon, Tensor? mask, Tensor? rows, "
    "Tensor? columns, Tensor? border, bool similarity"
)
COUNT = 9  # arguments of SCHEMA
GRADIENTS = (
    "Tensor grad_cost, Tensor grad_a, Tensor grad_b, Tensor grad_epsilon, Tensor grad_border"
)
DIFFERENTIABLE = (0, 1, 2, 3, 7)  # positions of cost, a, b, epsilon and border
SAME_MASS = 1e-4  # relative: what rounding may leave between the masses of a balanced problem


def problem_of(args: tuple) -> Problem:
    """The first arguments of an op as one object."""
    return Problem(*args[:COUNT])


def arguments_of(p: Problem) -> tuple:
    """In the order of ``SCHEMA``."""
    return (p.cost, p.a, p.b, p.epsilon, p.mask, p.rows, p.columns, p.border, p.similarity)


def refuses_translation(*args) -> str | None:
    """Of the kernels of the unrolled gradient, whose arguments these are."""
    p, (rho_a, rho_b) = problem_of(args), args[COUNT + 3 : COUNT + 5]
    if rho_a < torch.inf and rho_b < torch.inf and not (p.has_row or p.has_column):
        return "two penalties without a dustbin are translated, which has no kernel"
    return None


def refuses_relaxation(*args) -> str | None:
    """Of the Triton kernels of the iterations."""
    rho_a, rho_b, *_, relax, _ = args[COUNT + 1 :]
    return None if not relax or rho_a == rho_b == torch.inf else "over-relaxes balanced problems"


def fake_gradients(args: tuple) -> tuple[Tensor, ...]:
    """Those of DIFFERENTIABLE, contiguous; of a border that is not given, of size 0."""
    like = (args[n] for n in DIFFERENTIABLE)
    return tuple(args[1].new_empty(0) if t is None else t.new_empty(t.shape) for t in like)


def filled(grads: Sequence[Tensor | None], args: tuple) -> tuple[Tensor, ...]:
    """Gradients by a formula as those of an op: contiguous, of size 0 in place of None."""
    return tuple(args[1].new_zeros(0) if g is None else g.contiguous() for g in grads)


def spread(grads: Sequence[Tensor], args: tuple, more: Sequence[Tensor | None]) -> tuple:
    """Gradients of all arguments of an op: those of the schema, then ``more``."""
    result: list[Tensor | None] = [None] * COUNT
    for position, grad in zip(DIFFERENTIABLE, grads, strict=True):
        if args[position] is not None:
            result[position] = grad
    return (*result, *more)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_cost(name: str, cost: Tensor) -> Tensor:
    """(B, N, M) from that or (N, M)."""
    check_float(**{name: cost})
    if cost.dim() not in (2, 3):
        raise ValueError(f"{name} must be (B, N, M) or (N, M), got {tuple(cost.shape)}")
    return cost if cost.dim() == 3 else cost[None]


def check_marginal(name: str, weight: Tensor | None, like: Tensor, count: int) -> Tensor | None:
    """(B, count) in float32, of float64 costs float64; None stays None."""
    if weight is None:
        return None
    wide, B = wide_dtype(like), like.shape[0]
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(weight).__name__}")
    if weight.dtype not in (like.dtype, wide):
        raise TypeError(
            f"{name} must have the dtype of the costs, {like.dtype}, or {wide}, got {weight.dtype}"
        )
    if weight.shape not in ((count,), (B, count)) or weight.device != like.device:
        raise ValueError(
            f"{name} must be ({B}, {count}) or ({count},) on {like.device}, "
            f"got {tuple(weight.shape)} on {weight.device}"
        )
    if values_are_checked(weight) and not bool((weight >= 0).all() & weight.isfinite().all()):
        raise ValueError(f"{name} must be finite and not negative")
    return weight.to(wide).expand(B, count)


def check_lengths(lengths, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """How many rows and columns of each problem are real: int64 (B,) or None each."""
    if lengths is None:
        return None, None
    if not isinstance(lengths, tuple | list) or len(lengths) != 2:
        raise TypeError("lengths must be a pair (rows, columns) of int64 tensors or None")
    B, N, M = like.shape
    for name, given, largest in (("rows", lengths[0], N), ("columns", lengths[1], M)):
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.dtype != torch.int64:
            raise TypeError(f"lengths: {name} must be an int64 tensor or None")
        if given.shape != (B,) or given.device != like.device:
            raise ValueError(
                f"lengths: {name} must be ({B},) on {like.device}, "
                f"got {tuple(given.shape)} on {given.device}"
            )
        if values_are_checked(given) and B and not bool(((given >= 0) & (given <= largest)).all()):
            raise ValueError(f"lengths: {name} must be in [0, {largest}]")
    return tuple(lengths)


def check_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, N, M) bool, expanded."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
    shape = tuple(like.shape)
    fits = mask.dim() <= 3 and all(
        m in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits or mask.device != like.device:
        raise ValueError(
            f"mask must be broadcastable to {shape} on {like.device}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )
    return mask.expand(shape)


def positive(name: str, value: float | Tensor, like: Tensor, allow_zero: bool = False) -> Tensor:
    """A number > 0 for each problem, (B,), from a number or a tensor () or (B,)."""
    B, wide = like.shape[0], wide_dtype(like)
    if not isinstance(value, Tensor):
        value = torch.as_tensor(float(value), dtype=wide, device=like.device)
    elif not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating tensor, got {value.dtype}")
    if value.shape not in ((), (B,)) or value.device != like.device:
        raise ValueError(
            f"{name} must be a number, () or ({B},) on {like.device}, "
            f"got {tuple(value.shape)} on {value.device}"
        )
    if values_are_checked(value):
        fine = (value >= 0) if allow_zero else (value > 0)
        if not bool((fine & value.isfinite()).all()):
            kind = "≥ 0" if allow_zero else "> 0"
            raise ValueError(f"{name} must be {kind} and finite, got {value.detach().tolist()}")
    return value.to(wide).expand(B)


def check_rho(rho) -> tuple[float, float]:
    """The strengths of both marginals, infinite for a constraint."""
    pair = rho if isinstance(rho, tuple | list) else (rho, rho)
    if len(pair) != 2:
        raise ValueError(f"rho must be None, a number or a pair of those, got {rho!r}")
    numbers = tuple(torch.inf if r is None else float(r) for r in pair)
    if not all(r > 0 for r in numbers):
        raise ValueError(f"rho must be > 0, or None for a constraint, got {rho!r}")
    return numbers


def uniform(lengths: Tensor | None, like: Tensor, count: int) -> Tensor:
    """1 / n for each of the n real entries."""
    B, wide = like.shape[0], wide_dtype(like)
    if lengths is None:
        return like.new_full((B, count), 1.0 / max(count, 1), dtype=wide)
    real = torch.arange(count, device=like.device) < lengths[:, None]
    return real.to(wide) / lengths.clamp_min(1).to(wide)[:, None]


def marginals(
    a: Tensor | None,
    b: Tensor | None,
    like: Tensor,
    lengths: tuple[Tensor | None, Tensor | None],
    balanced: bool,
) -> tuple[Tensor, Tensor]:
    """Both weights, 0 beyond the lengths; those of a balanced problem have one mass, a's."""
    given, uniform_both = a is not None and b is not None, a is None and b is None
    full = []
    for name, weight, n, count in (
        ("a", a, lengths[0], like.shape[1]),
        ("b", b, lengths[1], like.shape[2]),
    ):
        weight = check_marginal(name, weight, like, count)
        if weight is None:
            weight = uniform(n, like, count)
        elif n is not None:
            weight = torch.where(torch.arange(count, device=n.device) < n[:, None], weight, 0)
        full.append(weight)
    a, b = full
    if not balanced:
        return a, b
    if uniform_both:  # the masses are 1, but for a problem without rows
        return a, b if lengths[0] is None else b * (lengths[0] > 0)[:, None]
    mass_a, mass_b = total(a), total(b)
    if given and values_are_checked(a):
        apart = (mass_a - mass_b).abs() > SAME_MASS * torch.maximum(mass_a, mass_b)
        if bool(apart.any()):
            one = int(apart.nonzero()[0])
            raise ValueError(
                "a and b must have the same mass where rho is None, got "
                f"{float(mass_a[one].detach()):.6g} and {float(mass_b[one].detach()):.6g}"
            )
    some = mass_b > 0
    return a, b * torch.where(some, mass_a / torch.where(some, mass_b, 1), 0)[:, None]
