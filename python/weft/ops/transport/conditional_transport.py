"""Conditional transport between two sets of points, both navigators at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.checks import autocast, check_float, values_are_checked
from weft.ops.pairwise.unit_rows import unit_rows
from weft.ops.registration import (
    FLOATS,
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.transport import conditional_transport as formula

METRICS = ("cosine", "sqeuclidean")


class ConditionalPlans(NamedTuple):
    """What ``weft.conditional_transport(..., return_plans=True)`` returns.

    Attributes:
        value: ``(B,)``, as without the plans.
        to_y: ``(B, N, M)``, the navigator from each x; rows sum to 1.
        to_x: ``(B, N, M)``, the navigator from each y; columns sum to 1.
    """

    value: Tensor
    to_y: Tensor
    to_x: Tensor


def conditional_transport(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    rho: float = 0.5,
    temperature: float | Tensor = 1.0,
    metric: str = "cosine",
    return_plans: bool = False,
) -> Tensor | ConditionalPlans:
    r"""The expected cost of moving the points x to y and y to x, each by a softmax of similarity.

    .. math::
        \text{out} = \rho \sum_i \bar a_i \sum_j \pi_{ij} C_{ij}
            + (1 - \rho) \sum_j \bar b_j \sum_i \kappa_{ij} C_{ij}, \quad
        \pi_{ij} = \frac{b_j e^{-C_{ij} / \tau}}{\sum_{j'} b_{j'} e^{-C_{ij'} / \tau}}, \quad
        \kappa_{ij} = \frac{a_i e^{-C_{ij} / \tau}}{\sum_{i'} a_{i'} e^{-C_{i'j} / \tau}}

    with C the cost, τ the ``temperature``, and the weights divided by their sums. As τ goes to 0
    this is the mean distance to the nearest point; as τ grows, the mean of all costs.

    Args:
        x: ``(B, N, D)``, any strides.
        y: ``(B, M, D)``, or ``(M, D)`` for the same points in each problem, which are not copied
            (and are left out entirely where no problem gives them a weight).
        a: weights of x, >= 0 in any float dtype, ``(B, N)`` or ``(N,)``; None are equal ones. A
            point of weight 0 takes no part, whatever it holds, and it and its weight have gradient
            0. Only ratios count: labels of 0 and 1 are weights.
        b: weights of y, ``(B, M)`` or ``(M,)``.
        x_lengths: ``(B,)`` int64 in ``[0, N]``: points from there on have weight 0.
        y_lengths: ``(B,)`` int64 in ``[0, M]``.
        rho: share of the cost from x to y, in ``[0, 1]``.
        temperature: τ > 0, a number or a tensor of one element, which may require a gradient.
        metric: cosine, :math:`C = 1 - \langle x, y \rangle / (\lVert x \rVert \lVert y \rVert)`, 1
            for a zero vector, or sqeuclidean, :math:`\lVert x - y \rVert^2`.
        return_plans: also both navigators, which are then stored.

    Returns:
        ``(B,)`` in the dtype of x: float64, float32, bfloat16 or float16, the same as y; half
        precision accumulates in float32. 0 where all weights of a side are 0. Differentiable twice
        in x, y, a, b and ``temperature``. The product of x and y is PyTorch's own, and its last
        bits may depend on the number of threads. With ``return_plans`` a
        :class:`ConditionalPlans`.

    Raises:
        ValueError: shapes or devices that do not match, negative weights, lengths, ``rho`` or
            ``temperature`` out of range, an unknown ``metric``.
        TypeError: dtypes that differ or are not supported.

    Source: Li et al., "PatchCT: Aligning Patch Set and Label Set with Conditional Transport for
    Multi-Label Image Classification", ICCV 2023; Zheng and Zhou, "Exploiting Chain Rule and Bayes'
    Theorem to Compare Probability Distributions", NeurIPS 2021, section 2.
    """
    x, y = autocast(x, y)
    _check(x, y, rho, metric)
    (B, N, _), M = x.shape, y.shape[-2]
    a = _weights("a", a, x_lengths, B, N, x)
    b = _weights("b", b, y_lengths, B, M, x)
    temperature = _temperature(temperature, x)
    if a is not None:
        x = torch.where((a > 0)[..., None], x, 0)
    if b is not None:
        used = b > 0 if y.dim() == 3 else (b > 0).any(0)
        y = torch.where(used[..., None], y, 0)
    s, offset = _similarity(x, y, metric)
    (share_a, log_a), (share_b, log_b) = _shares(a), _shares(b)
    op = formula.conditional_transport if transformed() else forward
    to_y, to_x, *_ = op(s.contiguous(), log_a, log_b, temperature)
    value = offset - rho * _mean(to_y, share_a) - (1 - rho) * _mean(to_x, share_b)
    if N == 0 or M == 0:
        value = value * 0
    for weights in (a, b):
        if weights is not None:
            value = torch.where((weights > 0).any(-1), value, 0)
    value = value.to(x.dtype)
    if not return_plans:
        return value
    plans = (
        formula.plan(s, logs, temperature, dim).to(x.dtype)
        for logs, dim in ((log_b, 2), (log_a, 1))
    )
    return ConditionalPlans(value, *plans)


def _check(x, y, rho, metric):
    check_float(x=x, y=y)
    if x.dim() != 3:
        raise ValueError(f"x must be (B, N, D), got {tuple(x.shape)}")
    B, _, D = x.shape
    if y.dim() not in (2, 3) or y.shape[-1] != D or (y.dim() == 3 and y.shape[0] != B):
        raise ValueError(f"y must be ({B}, M, {D}) or (M, {D}), got {tuple(y.shape)}")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1], got {rho}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")


def _weights(
    name: str, weights: Tensor | None, lengths: Tensor | None, B: int, count: int, like: Tensor
) -> Tensor | None:
    """``(B, count)`` in the dtype of sums, 0 from the lengths on; None if all are equal."""
    wide = formula.wide(like.dtype)
    if weights is not None:
        if not isinstance(weights, Tensor) or weights.dtype not in FLOATS:
            got = getattr(weights, "dtype", type(weights).__name__)
            raise TypeError(f"{name} must be a float tensor, got {got}")
        if weights.shape not in ((B, count), (count,)) or weights.device != like.device:
            raise ValueError(
                f"{name} must be ({B}, {count}) or ({count},) on {like.device}, "
                f"got {tuple(weights.shape)} on {weights.device}"
            )
        if values_are_checked(weights) and (weights < 0).any():
            raise ValueError(f"{name} must be >= 0, got {float(weights.min())}")
        weights = weights.to(wide).expand(B, count)
        weights = torch.where(weights > 0, weights, 0)  # without a gradient at 0
    if lengths is None:
        return weights
    _check_lengths("x_lengths" if name == "a" else "y_lengths", lengths, B, count, like)
    used = torch.arange(count, device=like.device) < lengths[:, None]
    return used.to(wide) if weights is None else torch.where(used, weights, 0)


def _check_lengths(name: str, lengths: Tensor, B: int, most: int, like: Tensor) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        got = getattr(lengths, "dtype", type(lengths).__name__)
        raise TypeError(f"{name} must be an int64 tensor, got {got}")
    if lengths.shape != (B,) or lengths.device != like.device:
        raise ValueError(
            f"{name} must be ({B},) on {like.device}, got {tuple(lengths.shape)} "
            f"on {lengths.device}"
        )
    if values_are_checked(lengths) and B and not 0 <= lengths.min() <= lengths.max() <= most:
        raise ValueError(
            f"{name} must be in [0, {most}], got {int(lengths.min())} to {int(lengths.max())}"
        )


def _temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """As a tensor of one element in the dtype of sums: kernels read it, the host does not."""
    wide = formula.wide(like.dtype)
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        return torch.full((), temperature, dtype=wide, device=like.device)
    if temperature.numel() != 1 or temperature.device != like.device:
        raise ValueError(
            f"temperature must have one element on {like.device}, got "
            f"{tuple(temperature.shape)} on {temperature.device}"
        )
    if temperature.dtype not in FLOATS:
        raise TypeError(f"temperature must be a number or a float tensor, got {temperature.dtype}")
    if values_are_checked(temperature) and not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {float(temperature)}")
    return temperature.to(wide).reshape(())


def _similarity(x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, float]:
    """(s, offset) with the cost = offset − s."""
    if metric == "cosine":
        return unit_rows(x) @ unit_rows(y).mT, 1.0
    center = y.detach().mean(-2, keepdim=True)  # digits of points far from the origin
    x, y = x - center, y - center
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]
    return 2 * (x @ y.mT) - squares, 0.0


def _shares(weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The weights over their sum, and their logarithms, without a gradient where they are 0."""
    if weights is None:
        return None, None
    total = weights.sum(-1, keepdim=True)
    share = weights / torch.where(total > 0, total, 1)
    used = share > 0
    return share, torch.where(used, torch.where(used, share, 1).log(), -torch.inf)


def _mean(values: Tensor, share: Tensor | None) -> Tensor:
    if share is None:
        return values.sum(-1) / max(values.shape[-1], 1)
    return (share * values).sum(-1)


def _fake(similarity, log_a, log_b, temperature):
    (B, N, M), dtype = similarity.shape, formula.wide(similarity.dtype)
    shapes = ((B, N), (B, M), (2, B, N), (2, B, M))
    return tuple(similarity.new_empty(shape, dtype=dtype) for shape in shapes)


def _reference(*args):
    return tuple(t.contiguous() for t in formula.conditional_transport(*args))


def _fake_backward(similarity, grad_row, grad_column, log_a, log_b, temperature, *_):
    of = lambda logs: grad_row.new_empty(0 if logs is None else logs.shape)  # noqa: E731
    return similarity.new_empty(similarity.shape), of(log_a), of(log_b), temperature.new_empty(())


def _formula_backward(*args):
    return formula.conditional_transport_backward(*args[:6])


def _reference_backward(*args):
    return tuple(grad.contiguous() for grad in _formula_backward(*args))


forward = Op(
    "conditional_transport",
    "(Tensor similarity, Tensor? log_a, Tensor? log_b, Tensor temperature) "
    "-> (Tensor row_mean, Tensor column_mean, Tensor row_stats, Tensor column_stats)",
    family="transport",
    fake=_fake,
    implementations=[
        cpu("conditional_transport"),
        triton("transport.conditional_transport", "conditional_transport"),
        reference(_reference),
    ],
)
backward = Op(
    "conditional_transport_backward",
    "(Tensor similarity, Tensor grad_row, Tensor grad_column, Tensor? log_a, Tensor? log_b, "
    "Tensor temperature, Tensor row_mean, Tensor column_mean, Tensor row_stats, "
    "Tensor column_stats) "
    "-> (Tensor grad_similarity, Tensor grad_log_a, Tensor grad_log_b, Tensor grad_temperature)",
    family="transport",
    fake=_fake_backward,
    implementations=[
        cpu("conditional_transport_backward"),
        triton("transport.conditional_transport", "conditional_transport_backward"),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx, grad_row, grad_column, *_):
    similarity, log_a, log_b, *rest = ctx.saved_tensors
    grads = backward(
        similarity, grad_row.contiguous(), grad_column.contiguous(), log_a, log_b, *rest
    )
    grad_similarity, grad_a, grad_b, grad_temperature = grads
    grad_a, grad_b = (
        None if logs is None else grad for logs, grad in ((log_a, grad_a), (log_b, grad_b))
    )
    return grad_similarity, grad_a, grad_b, grad_temperature


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(backward, _formula_backward, arguments=[0, 1, 2, 3, 4, 5])
