"""Counts, means and squared deviations of the rows of each class."""

import torch
import torch.distributed as dist
from torch import Tensor

from weft.dispatch import transformed
from weft.ops.checks import check_float, values_are_checked
from weft.ops.registration import (
    FLOATS,
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
)
from weft.ops.stats.moments import SegmentStats
from weft.reference.stats import segment_stats as formula

COVARIANCES = (False, True, "class", "shared")


def segment_stats(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    covariance: bool | str = False,
    previous: SegmentStats | None = None,
    weights: Tensor | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> SegmentStats:
    r"""Count, mean and sum of squared deviations of the rows of each class.

    .. math::
        n_c = \sum_{i: l_i = c} w_i, \qquad
        \mu_c = \frac{1}{n_c} \sum_{i: l_i = c} w_i x_i, \qquad
        M_c = \sum_{i: l_i = c} w_i (x_i - \mu_c)^2

    The deviations are summed around means, never as a difference of two large sums, so that data
    far from the origin lose nothing.

    Args:
        x: rows, ``(N, D)``, any strides.
        labels: the class of each row, ``(N,)`` int64 in ``[0, num_classes)``.
        num_classes: C, with those that have no row.
        covariance: ``"class"`` (or True) also sums the products of deviations of each class,
            ``"shared"`` those of all classes around their own means, the pooled within-class
            scatter of discriminant analysis. Products of ``torch.matmul`` on rows minus means:
            they take the memory of x again, and their last bits may depend on the number of
            threads, which those of the rest do not.
        previous: statistics of earlier rows, which these are merged into.
        weights: of the rows, ``(N,)`` of any float dtype, >= 0. A row of weight 0 is not read, and
            has gradient 0.
        group: a process group: the statistics are those of the rows of all its ranks, merged in
            the order of the ranks, the same on each. Those of other ranks are constants to
            autograd. ``previous`` is merged after, and has to be the same on all ranks.

    Returns:
        A :class:`SegmentStats` in the dtype of x, of half precision in float32: ``count`` ``(C,)``
        int64, or the sums of weights; ``mean`` and ``m2`` ``(C, D)``, 0 for a class without rows;
        ``scatter`` if asked for. Differentiable twice in x, weights and ``previous``.

    Raises:
        ValueError: shapes or devices that do not match, labels outside the classes, negative
            weights, an unknown ``covariance``.
        TypeError: dtypes that are not supported.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979; class means and covariances as in Lee et al., "A Simple Unified
    Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018,
    equation 1.
    """
    _check(x, labels, num_classes, covariance, previous, weights)
    if weights is not None:
        weights = weights.to(formula.wide(x.dtype))
    x_rows = x if x.stride(1) == 1 else x.contiguous()
    op = formula.segment_stats if transformed() else forward
    mean, m2, _, count = op(x_rows, labels.contiguous(), _contiguous(weights), num_classes)
    scatter = None
    if covariance is not False:
        scatter = formula.scatter(x, labels, weights, mean, covariance == "shared")
    stats = SegmentStats(count, mean, m2, scatter)
    if group is not None:
        stats = _over_ranks(stats, group)
    return stats if previous is None else previous.merge(stats)


def _over_ranks(stats: SegmentStats, group) -> SegmentStats:
    """Every rank gathers all and merges in their order; its own part keeps its graph."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    gathered = []
    for value in stats:
        parts = [None] * ranks
        if value is not None:
            parts = [torch.empty_like(value) for _ in range(ranks)]
            dist.all_gather(parts, value.detach().contiguous(), group=group)
        gathered.append(parts)
    of_ranks = [SegmentStats(*parts) for parts in zip(*gathered, strict=True)]
    of_ranks[rank] = stats
    merged = of_ranks[0]
    for other in of_ranks[1:]:
        merged = merged.merge(other)
    return merged


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check(x, labels, num_classes, covariance, previous, weights):
    check_float(x=x)
    if x.dim() != 2:
        raise ValueError(f"x must be (N, D), got {tuple(x.shape)}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(
            f"labels must be an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    N = x.shape[0]
    if labels.shape != (N,) or labels.device != x.device:
        raise ValueError(
            f"labels must be ({N},) on {x.device}, got {tuple(labels.shape)} on {labels.device}"
        )
    if num_classes < 0:
        raise ValueError(f"num_classes must be >= 0, got {num_classes}")
    if values_are_checked(labels) and N:
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), got {low} to {high}")
    if covariance not in COVARIANCES:
        raise ValueError(f"covariance must be one of {COVARIANCES}, got {covariance!r}")
    if previous is not None and not isinstance(previous, SegmentStats):
        raise TypeError(f"previous must be SegmentStats, got {type(previous).__name__}")
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.dtype not in FLOATS:
        raise TypeError(
            f"weights must be a float tensor, got {getattr(weights, 'dtype', type(weights))}"
        )
    if weights.shape != (N,) or weights.device != x.device:
        raise ValueError(
            f"weights must be ({N},) on {x.device}, got {tuple(weights.shape)} on {weights.device}"
        )
    if values_are_checked(weights) and (weights < 0).any():
        raise ValueError(f"weights must be >= 0, got {float(weights.min())}")


def _fake(x, labels, weights, num_classes):
    shape, dtype = (num_classes, x.shape[1]), formula.wide(x.dtype)
    count = x.new_empty(num_classes, dtype=torch.int64 if weights is None else dtype)
    return *(x.new_empty(shape, dtype=dtype) for _ in range(3)), count


def _reference(*args):
    return formula.segment_stats(*args)


def _fake_backward(x, grad_count, grad_mean, grad_m2, labels, weights, total, mean, low):
    grad_weights = mean.new_empty(0 if weights is None else x.shape[0])
    return x.new_empty(x.shape), grad_weights


def _reference_backward(*args):
    return tuple(grad.contiguous() for grad in formula.segment_stats_backward(*args))


forward = Op(
    "segment_stats",
    "(Tensor x, Tensor labels, Tensor? weights, SymInt num_classes) "
    "-> (Tensor mean, Tensor m2, Tensor low, Tensor count)",
    family="stats",
    fake=_fake,
    implementations=[cpu("segment_stats"), reference(_reference)],
)
backward = Op(
    "segment_stats_backward",
    "(Tensor x, Tensor? grad_count, Tensor grad_mean, Tensor grad_m2, Tensor labels, "
    "Tensor? weights, Tensor total, Tensor mean, Tensor low) "
    "-> (Tensor grad_x, Tensor grad_weights)",
    family="stats",
    fake=_fake_backward,
    implementations=[cpu("segment_stats_backward"), reference(_reference_backward)],
)


def _setup(ctx, inputs, output):
    x, labels, weights, _ = inputs
    mean, _, low, count = output
    ctx.mark_non_differentiable(low, *([count] if weights is None else []))
    ctx.save_for_backward(x, labels, weights, count, mean, low)


def _gradient(ctx, grad_mean, grad_m2, _, grad_count):
    x, labels, weights, count, mean, low = ctx.saved_tensors
    grads = (None if weights is None else grad_count.contiguous(), grad_mean, grad_m2)
    grads = (grads[0], *(g.contiguous() for g in grads[1:]))
    grad_x, grad_weights = backward(x, *grads, labels, weights, count.to(mean.dtype), mean, low)
    return grad_x, None, None if weights is None else grad_weights, None


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(
    backward, formula.segment_stats_backward, arguments=[0, 1, 2, 3, 5, 6, 7]
)
