"""The closed algebra: pair functions × reductions × masks, by one of three plans."""

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.checks import check_float
from weft.ops.pairwise import distance
from weft.ops.pairwise.dense import GRADIENTS, fake_gradients, only_wanted, or_none, wanted_of
from weft.ops.pairwise.masks import SCHEMA as MASK
from weft.ops.pairwise.masks import PairMask, mask_of
from weft.ops.pairwise.nearest import Nearest, select, wide_tensors
from weft.ops.pairwise.pairs import SCHEMA, Operands, hyperbolic_of_tensor, pair_of
from weft.ops.pairwise.planner import BACKWARD, FORWARD, check_plan, planned_cpu
from weft.ops.registration import (
    Op,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.pairwise import pairwise as formula
from weft.reference.pairwise.pairs import Pair

SELECTIVE = ("min", "max", "topk")
REDUCTIONS = ("sum", "mean", "logsumexp", *SELECTIVE)


def pairwise(
    x: Tensor,
    y: Tensor,
    *,
    pair: str,
    reduce: str | None = None,
    over: str = "y",
    mask: Tensor | PairMask | None = None,
    plan: str = "auto",
    values: Tensor | None = None,
    k: int = 1,
    largest: bool = True,
    scale: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    curvature: float | Tensor = 1.0,
    precision: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor | Nearest | tuple:
    r"""A function of every pair of rows of two matrices, reduced over one of them.

    .. math::
        s_{ij} = \text{pair}(x_i, y_j), \qquad
        \text{out}_i = \sum_j s_{ij}, \quad \sum_j s_{ij} v_j, \quad
        \frac{1}{\lvert J_i \rvert} \sum_j s_{ij}, \quad \log \sum_j e^{s_{ij}}, \quad
        \min_j s_{ij}, \quad \max_j s_{ij}

    over the columns :math:`J_i` that the mask allows in row i. No reduction stores the (N, M)
    matrix, forward or backward: memory beyond inputs, results and gradients does not grow with
    N · M. What a mask leaves out is never read into a result, whatever it holds.

    Args:
        x: ``(N, D)``, any strides.
        y: ``(M, D)``, any strides.
        pair: dot ``scale ⟨x, y⟩ + bias``, cosine ``scale ⟨x, y⟩ / (‖x‖ ‖y‖) + bias``, sqeuclidean,
            euclidean, l1, rbf ``exp(−gamma ‖x − y‖²)``, log ``log((d² + 1) / (d² + eps))``,
            mahalanobis, poincare or lorentz, as in ``weft.pairwise_distance``.
        reduce: None, sum, mean, logsumexp, min, max or topk.
        over: what is reduced: the rows of y (a result for each of x), the rows of x (for each of
            y), or both, which gives a pair of results.
        mask: the pairs that count: ``(N, M)`` bool, any strides, or a ``weft.PairMask``; None
            allows all.
        plan: of dense reductions: auto, direct (differences in registers), fused (products reduced
            in cache) or chunked (large products; on a GPU alone). Results agree up to rounding. The
            selective reductions have one plan of their own.
        values: of a sum, ``(M, E)`` or ``(M,)`` over y, ``(N, E)`` or ``(N,)`` over x.
        k: of topk, how many.
        largest: of topk, whether the largest or the smallest.
        scale: of dot and cosine.
        gamma: of rbf, > 0.
        eps: of log, > 0.
        curvature: of poincare and lorentz, > 0: a number, or a 0-d tensor that may require a
            gradient, except for logsumexp.
        precision: of mahalanobis, ``(D, D)`` symmetric positive definite.
        bias: ``(M,)``, added to dot and cosine.

    Returns:
        Without reduction ``(N, M)``, 0 where masked. For sum, mean and logsumexp ``(N,)``, or
        ``(N, E)`` with values; where no pair counts 0, 0 and -infinity with gradients of 0. For
        min, max and topk a named tuple of ``values`` and ``indices`` (int64), ``(N,)`` or
        ``(N, k)``, ties to the lowest index, as in ``weft.nearest``; where no pair counts infinity
        (min) or -infinity (max) and -1. ``over="x"`` has M in place of N; ``over="both"`` gives the
        tuple (over y, over x). Contiguous, in the dtype of x: float64, float32, bfloat16 or
        float16, the same as y and ``values``; half precision accumulates in float32. Differentiable
        twice in x, y, ``values``, ``bias``, ``precision`` and ``curvature``.

    Raises:
        ValueError: shapes or devices that do not match, names that are not known, options that do
            not go together, parameters out of range.
        TypeError: dtypes that differ or are not supported.

    Source: Charlier et al., "Kernel Operations on the GPU, with Autodiff, without Memory
    Overflows", JMLR 2021, equation 1 (a reduction of a formula over pairs of rows).
    """
    if reduce is not None and reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be None or one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if over not in ("y", "x", "both"):
        raise ValueError(f"over must be y, x or both, got {over!r}")
    factor = None
    if isinstance(curvature, Tensor) and pair in ("poincare", "lorentz"):
        if reduce == "logsumexp":
            raise ValueError("curvature must be a number for logsumexp, not a tensor")
        operands, factor = hyperbolic_of_tensor(pair, x, y, curvature)
    else:
        parameters = {"scale": scale, "gamma": gamma, "eps": eps, "curvature": curvature}
        operands = pair_of(pair, x, y, **parameters, precision=precision, bias=bias)
    mask = mask_of(mask, x, y)
    _check_options(reduce, over, plan, values, k, operands)
    if reduce is None:
        s = distance.matrix(operands, factor, plan)
        allowed = mask.block(0, x.shape[0], y.shape[0], x.device)
        return s if allowed is None else torch.where(allowed, s, 0)
    one = _selected if reduce in SELECTIVE else _reduced
    options = (k if reduce == "topk" else 1, largest) if reduce in SELECTIVE else (values, plan)
    run = lambda o, bias, m: one(o, bias, m, factor, reduce, *options)  # noqa: E731
    results = []
    if over != "x":
        results.append(run(operands, None, mask))
    if over != "y":
        results.append(run(_exchanged(operands), operands.bias, mask.mT))
    return results[0] if len(results) == 1 else tuple(results)


def _check_options(reduce, over, plan, values, k, operands: Operands) -> None:
    if reduce is None and over != "y":
        raise ValueError(f"over={over!r} goes with a reduction")
    if reduce in SELECTIVE and plan != "auto":
        raise ValueError(f"plan: {reduce} has one plan of its own; plan must be auto")
    check_plan(plan, operands.x.device, operands.pair.base)
    if reduce == "topk":
        if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
            raise TypeError(f"k must be an integer, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
    if values is None:
        return
    if reduce != "sum" or over == "both":
        raise ValueError("values go with reduce='sum' over y or over x")
    check_float(x=operands.x, values=values)
    n = (operands.y if over == "y" else operands.x).shape[0]
    if values.dim() not in (1, 2) or values.shape[0] != n:
        raise ValueError(f"values must be ({n}, E) or ({n},), got {tuple(values.shape)}")


def _exchanged(o: Operands) -> Operands:
    """x and y in each other's place; a bias of columns is then one of rows, left to the caller."""
    return Operands(o.y, o.x, o.pair, o.column_factor, o.row_factor)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _selected(o: Operands, bias, mask: PairMask, factor, reduce, k, largest) -> Nearest:
    largest = reduce == "max" or (reduce == "topk" and largest)
    found, indices = select(o, mask, k, largest)
    dtype = found.dtype
    if bias is not None:  # of the row: it does not change the order
        found = (found.to(_wide(o.x)) + bias[:, None]).to(dtype)
    if factor is not None:
        found = (factor * found).to(dtype)
    if reduce != "topk":
        found, indices = found.squeeze(1), indices.squeeze(1)
    return Nearest(found, indices)


def _reduced(o: Operands, bias, mask: PairMask, factor, reduce, values, plan) -> Tensor:
    """A dense reduction over the columns; ``bias`` belongs to the rows."""
    if reduce == "logsumexp":
        out = _logsumexp(o, mask, plan)
        return (out if bias is None else out + bias).to(o.x.dtype)
    wide = _wide(o.x)
    columns = None if values is None else values.to(wide).reshape(values.shape[0], -1)
    out = _sum(o, mask, columns, plan)
    if bias is not None:
        times = _count(o, mask, columns)
        out = out + (bias if values is None else bias[:, None]) * times
    if factor is not None:
        out = out * factor
    if reduce == "mean":
        out = out / _count(o, mask, None).clamp_min(1)
    return (out if values is None else out.reshape(o.x.shape[0], *values.shape[1:])).to(o.x.dtype)


def _count(o: Operands, mask: PairMask, values: Tensor | None) -> Tensor:
    """How many columns each row may see, or the sum of their values: a sum of s_ij = 1."""
    wide = _wide(o.x)
    none = lambda t: t.detach()[:, :0].to(wide)  # noqa: E731
    ones = Operands(none(o.x), none(o.y), Pair("dot", shift=1.0))
    return _sum(ones, mask, values, "auto")


def _sum(o: Operands, mask: PairMask, values: Tensor | None, plan: str) -> Tensor:
    if transformed():
        allowed = mask.block(0, o.x.shape[0], o.y.shape[0], o.x.device)
        factors = (o.row_factor, o.column_factor, o.bias)
        return formula.pairwise_sum(o.x, o.y, *factors, o.pair, allowed, values)
    return sum_forward(*wide_tensors(o), *mask.arguments(), values, plan)


def _logsumexp(o: Operands, mask: PairMask, plan: str) -> Tensor:
    if transformed():
        allowed = mask.block(0, o.x.shape[0], o.y.shape[0], o.x.device)
        factors = (o.row_factor, o.column_factor, o.bias)
        return formula.pairwise_logsumexp(o.x, o.y, *factors, o.pair, allowed)
    return logsumexp_forward(*wide_tensors(o), *mask.arguments(), plan)


def _split(args: tuple) -> tuple:
    """(tensors and their Pair and mask, the rest) of arguments that begin with both schemas."""
    mask = PairMask(*args[10:15]).block(0, args[0].shape[0], args[1].shape[0], args[0].device)
    return (*args[:5], Pair(*args[5:10]), mask), args[15:]


def _fake_sum(x, *rest):
    values = rest[-2]
    E = () if values is None else values.shape[1:]
    return x.new_empty(x.shape[0], *E, dtype=_wide(x))


def _reference_sum(*args):
    known, (values, _) = _split(args)
    return formula.pairwise_sum(*known, values).contiguous()


def _formula_sum_backward(grad, *args):
    known, (values, wanted, _) = _split(args)
    return only_wanted(formula.pairwise_sum_backward(grad, *known, values), args[:5], wanted)


def _fake_logsumexp(x, *rest):
    return x.new_empty(x.shape[0], dtype=_wide(x))


def _reference_logsumexp(*args):
    return formula.pairwise_logsumexp(*_split(args)[0]).contiguous()


def _formula_logsumexp_backward(grad, out, *args):
    known, (wanted, _) = _split(args)
    return only_wanted(formula.pairwise_logsumexp_backward(grad, out, *known), args[:5], wanted)


def _reference_sum_backward(*args):
    return tuple(g.contiguous() for g in _formula_sum_backward(*args))


def _reference_logsumexp_backward(*args):
    return tuple(g.contiguous() for g in _formula_logsumexp_backward(*args))


sum_forward = Op(
    "pairwise_sum",
    f"({SCHEMA}, {MASK}, Tensor? values, str plan) -> Tensor",
    family="pairwise",
    fake=_fake_sum,
    implementations=[
        planned_cpu("pairwise_sum", 0, FORWARD),
        triton("pairwise.pairwise", "pairwise_sum"),
        reference(_reference_sum),
    ],
)
sum_backward = Op(
    "pairwise_sum_backward",
    f"(Tensor grad, {SCHEMA}, {MASK}, Tensor? values, int wanted, str plan) -> {GRADIENTS}",
    family="pairwise",
    fake=lambda grad, *args: fake_gradients(args[:5], args[-2]),
    implementations=[
        planned_cpu("pairwise_sum_backward", 1, BACKWARD),
        triton("pairwise.pairwise", "pairwise_sum_backward"),
        reference(_reference_sum_backward),
    ],
)
logsumexp_forward = Op(
    "pairwise_logsumexp",
    f"({SCHEMA}, {MASK}, str plan) -> Tensor",
    family="pairwise",
    fake=_fake_logsumexp,
    implementations=[
        planned_cpu("pairwise_logsumexp", 0, FORWARD),
        triton("pairwise.pairwise", "pairwise_logsumexp"),
        reference(_reference_logsumexp),
    ],
)
logsumexp_backward = Op(
    "pairwise_logsumexp_backward",
    f"(Tensor grad, Tensor out, {SCHEMA}, {MASK}, int wanted, str plan) -> {GRADIENTS}",
    family="pairwise",
    fake=lambda grad, out, *args: fake_gradients(args[:5], args[-2]),
    implementations=[
        # The plan of the forward: e^(s − out) wants the same rounding of s.
        planned_cpu("pairwise_logsumexp_backward", 2, FORWARD),
        triton("pairwise.pairwise", "pairwise_logsumexp_backward"),
        reference(_reference_logsumexp_backward),
    ],
)


def _setup_sum(ctx, inputs, output):
    *known, values, ctx.plan = inputs
    ctx.save_for_backward(*known[:5], *known[10:13], values)
    ctx.pair, ctx.flags = tuple(known[5:10]), tuple(known[13:15])


def _gradient_sum(ctx, grad):
    *tensors, mask, x_labels, y_labels, values = ctx.saved_tensors
    of_mask = (mask, x_labels, y_labels, *ctx.flags)
    wanted = wanted_of(ctx, tensors)
    grads = [None] * 5
    if wanted:
        args = (*tensors, *ctx.pair, *of_mask, values, wanted, ctx.plan)
        grads = or_none(sum_backward(grad, *args), tensors, wanted)
    of_values = None
    if ctx.needs_input_grad[15]:  # Σ_i s_ij grad_i: the same sum with x and y exchanged
        o = Operands(*tensors[:2], Pair(*ctx.pair), *tensors[2:])
        m = PairMask(*of_mask).mT
        of_values = _sum(_exchanged(o), m, grad, ctx.plan)
        if o.bias is not None:
            of_values = of_values + o.bias[:, None] * _count(_exchanged(o), m, grad)
    return *grads, *[None] * 10, of_values, None


def _setup_logsumexp(ctx, inputs, output):
    *known, ctx.plan = inputs
    ctx.save_for_backward(*known[:5], *known[10:13], output)
    ctx.pair, ctx.flags = tuple(known[5:10]), tuple(known[13:15])


def _gradient_logsumexp(ctx, grad):
    *tensors, mask, x_labels, y_labels, out = ctx.saved_tensors
    wanted = wanted_of(ctx, tensors)
    of_mask = (mask, x_labels, y_labels, *ctx.flags)
    args = (*tensors, *ctx.pair, *of_mask, wanted, ctx.plan)
    grads = logsumexp_backward(grad, out, *args)
    return *or_none(grads, tensors, wanted), *[None] * 11


register_gradient(sum_forward, _setup_sum, _gradient_sum)
register_gradient_by_reference(
    sum_backward, _formula_sum_backward, arguments=[0, 1, 2, 3, 4, 5, 16]
)
register_gradient(logsumexp_forward, _setup_logsumexp, _gradient_logsumexp)
register_gradient_by_reference(
    logsumexp_backward, _formula_logsumexp_backward, arguments=[0, 1, 2, 3, 4, 5, 6]
)
