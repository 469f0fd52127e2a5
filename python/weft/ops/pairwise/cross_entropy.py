"""Cross entropies over all pairs of rows: a classifier's loss, and contrastive losses."""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from weft.dispatch import transformed
from weft.distributed.collectives import copy_to_group, sum_over_group
from weft.distributed.sharded import log_sum_exp_over_group, mean_or_sum, place_of_shard
from weft.ops.checks import autocast, check_float
from weft.ops.pairwise import targets as positive
from weft.ops.pairwise.cross_entropy_group import group_targets, ring_cross_entropy
from weft.ops.pairwise.targets import Targets, accumulation
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.pairwise import cross_entropy as formula

# Whole rows of logits in this much memory: the forward then has a block's softmax while it is in
# cache, and forms the gradient with it, three products in all instead of four. Blocks of fewer rows
# than this would read and write the gradient of y more often than that saves.
ROW_BYTES, LEAST_ROWS = 32 << 20, 512


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    margin: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""``F.cross_entropy(F.linear(x, weight, bias), target)`` without the matrix of logits.

    .. math::
        s_{ij} = c \tanh(v_{ij} / c), \quad v_{ij} = \langle x_i, w_j \rangle + b_j, \qquad
        s_{i t_i} \mathrel{-}= m, \qquad
        \ell_i = \log \textstyle\sum_j e^{s_{ij}} - \sum_j T_{ij} s_{ij}

    with :math:`T = (1 - \varepsilon)` one-hot :math:`+\, \varepsilon / C`.

    Args:
        x: features, ``(N, D)``.
        weight: one row per class, ``(C, D)``.
        target: class of each feature, ``(N,)`` int64.
        bias: ``(C,)``, in the dtype of x.
        softcap: c > 0, a bound of the logits (Gemma 2); None for none.
        margin: m, subtracted from the logit of the target (CosFace: scale times its margin, with x
            and weight normalised and one of them scaled by the caller); after the softcap.
        ignore_index: samples with this target have no loss, and do not count in the mean.
        label_smoothing: ε in [0, 1].
        reduction: ``"mean"`` over the samples that count, ``"sum"`` or ``"none"``.
        group: the classes are spread over its ranks: ``weight`` and ``bias`` have those of this
            rank, which follow those of the ranks before; ``x`` and ``target`` are the same on all.
            So are the loss and the gradient of ``x``; only vectors of N numbers travel.

    Returns:
        0-d, or ``(N,)`` with 0 for ignored samples: float64 for float64, else float32. The mean of
        no sample is NaN, with gradient 0, as in ``F.cross_entropy``. Gradients are exact: no
        probability is dropped. Differentiable twice in ``x``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes, devices, a target out of range, options out of range.
        TypeError: dtypes that differ or are not supported.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025, here
    without its filter; Wang et al., "CosFace", CVPR 2018, equation 4, for the margin.
    """
    x = x if group is None else copy_to_group(x, group)
    x, weight, bias = autocast(x, weight, bias)
    _check_linear(x, weight, target, bias, softcap, margin, label_smoothing)
    _check_reduction(reduction)
    first, classes = 0, weight.shape[0]
    if group is not None:
        first, classes = place_of_shard(classes, x.device, group)
    positive.check_labels_in_range("target", target, classes, ignore_index)
    counts = target != ignore_index
    dtype = accumulation(x.dtype)
    share = (1.0 - label_smoothing) * counts.to(dtype)
    of = Targets((target - first).masked_fill(~counts, -1), share)
    uniform = label_smoothing / max(classes, 1)
    options = (1.0, float(softcap or 0), float(margin or 0), uniform, False)
    bias = None if bias is None else bias.to(dtype)
    if reduction == "none" or group is not None:
        _, lse, t, _, _ = _run(x, weight, None, bias, of, None, None, None, *options)
        if group is not None:
            lse, t = log_sum_exp_over_group(lse, group), sum_over_group(t, group)
        return mean_or_sum(torch.where(counts, lse - t, 0), counts, reduction)
    total = _run(x, weight, None, bias, of, None, counts.to(dtype), None, *options)[0]
    if reduction == "sum":
        return total
    count = counts.sum()
    nothing = torch.where(count == 0, torch.nan, 0.0).to(dtype)
    return total / count.clamp(min=1) + nothing


def contrastive_loss(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kind: str = "infonce",
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor,
    symmetric: bool = False,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    positives: Tensor | None = None,
    bias: float | Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Contrastive losses between the rows of x and of y, without the matrix of similarities.

    With :math:`s_{ij} = \langle x_i, y_j \rangle / \tau` and the positives P(i) of row i,

    .. math::
        \ell_i = \log \sum_j e^{s_{ij}} - \frac{1}{|P(i)|} \sum_{j \in P(i)} s_{ij}
        \quad \text{or, sigmoid,} \quad
        \ell_i = -\sum_j \log \sigma(z_{ij} (s_{ij} + b)), \; z_{ij} = \pm 1

    ==========  ====================================================================
    infonce     row i of y is the positive of row i of x; rows of y beyond them are further
                negatives (a queue). Without y the rows i and i + N/2 of x are two views of one
                sample, and a row is no pair with itself (NT-Xent of SimCLR)
    supcon      rows with equal ``labels``; without y among the rows of x, the row itself left
                out. The mean over positives is outside of the logarithm
    sigmoid     as infonce, or by ``labels``; every pair is a classification of its own (SigLIP)
    ==========  ====================================================================

    Args:
        x: ``(N, D)``. Nothing is normalised: for cosines pass unit rows.
        y: ``(M, D)``, ``M >= N`` where positives are on the diagonal.
        kind: ``"infonce"``, ``"supcon"`` or ``"sigmoid"``.
        labels: ``(N,)`` int64, of x and of y; or a pair, ``(N,)`` of x and ``(M,)`` of y.
        temperature: τ > 0, a number or a 0-d tensor, which gets a gradient.
        symmetric: the mean of the losses of rows and of columns (CLIP), from one product.
        weights: ``(N,)``, factors of the samples' losses; with ``symmetric``, of the pairs'.
        mask: ``(N, M)`` bool: False leaves a pair out unless it is a positive.
        positives: ``(N, M)`` bool, in place of labels (ConR: near targets).
        bias: b, a number or a 0-d tensor, for sigmoid (0 if None).
        reduction: ``"mean"`` over the samples that count, ``"sum"`` or ``"none"``.
        group: the rows of y of all its ranks are columns for each; ``x``, ``y``, ``labels`` and
            ``weights`` are this rank's (positives on the diagonal are this rank's too), ``mask`` is
            (N, ranks · M). The blocks of y go around a ring, one at a time. The loss is that of all
            rows, on every rank, and the gradients are its: those of parameters add up over ranks
            (DistributedDataParallel averages: multiply by their number). Differentiable once.

    Returns:
        0-d or ``(N,)``: float64 for float64, else float32. A sample without positives has loss 0
        and does not count in the mean (sigmoid: it does); the mean of no sample is 0.
        Differentiable twice in ``x``, ``y``, ``temperature`` and ``bias``, once in ``weights``.

    Raises:
        ValueError: shapes, devices, arguments that do not go together, values out of range.
        TypeError: dtypes that differ or are not supported.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
    equation 4; Radford et al., "CLIP", ICML 2021, figure 3; Khosla et al., "Supervised Contrastive
    Learning", NeurIPS 2020, equation 2; Zhai et al., "Sigmoid Loss", ICCV 2023, equation 1.
    """
    x, y = autocast(x, y) if y is not None else (*autocast(x), None)
    sigmoid = kind == "sigmoid"
    of = positive.contrastive_targets(x, y, kind, labels, positives, symmetric)
    y = x if y is None else y
    N, M = x.shape[0], y.shape[0]
    ranks = 1 if group is None else group.size()
    positive.check_pairs("mask", mask, N, ranks * M, x.device)
    _check_reduction(reduction)
    if symmetric and N != M and (reduction == "none" or weights is not None):
        raise ValueError(f"both sides of pairs need N = M, got {N} and {M}")
    dtype = accumulation(x.dtype)
    weights = positive.checked_weights(weights, x)
    scale, factor = positive.scale_of(temperature, x)
    shift = positive.bias_of(bias, kind, M, x)
    options = (scale, 0.0, 0.0, 0.0, sigmoid)
    if group is not None:
        blocks = group_targets(of, M, sigmoid, group)
        of = blocks.local
    counts = [s > 0 for s in of.shares()]
    sides = len(counts)
    if group is not None or reduction == "none" or (weights is not None and weights.requires_grad):
        if group is None:
            sums = _run(x, y, factor, shift, of, mask, None, None, *options)[1:]
        else:
            operands = (x, y, factor, shift, blocks, mask, sigmoid, options, group)
            sums = ring_cross_entropy(forward, backward, *operands)
        lse, t, column_lse, column_t = sums
        pairs = [(lse, t), (column_lse, column_t)][:sides]
        losses = [torch.where(c, a - b, 0) for c, (a, b) in zip(counts, pairs, strict=True)]
        if weights is not None:
            losses = [weights * loss for loss in losses]
        if reduction == "none":
            return sum(losses) / sides
        divisors = [_number(c, group) if reduction == "mean" else 1 for c in counts]
        total = sum(loss.sum() / d for loss, d in zip(losses, divisors, strict=True)) / sides
        return total if group is None else sum_over_group(total, group)
    factors = []
    for c in counts:
        each = c.to(dtype) if weights is None else torch.where(c, weights, 0)
        factors.append(each / (sides * (_number(c, None) if reduction == "mean" else 1)))
    row_weight, column_weight = factors[0], factors[1] if symmetric else None
    return _run(x, y, factor, shift, of, mask, row_weight, column_weight, *options)[0]


def _number(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """How many samples count, on all ranks; at least 1."""
    count = counts.sum()
    return (count if group is None else sum_over_group(count, group)).clamp(min=1)


def _check_linear(x, weight, target, bias, softcap, margin, label_smoothing):
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_float(**tensors)
    if x.dim() != 2:
        raise ValueError(f"x must be (N, D), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be (C, D) with D = {x.shape[1]}, got {tuple(weight.shape)}")
    C = weight.shape[0]
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias must be ({C},), got {tuple(bias.shape)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and > 0, got {softcap}")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    positive.check_index("target", target, x.shape[0], x.device)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _run(x, y, factor, bias, of, mask, row_weight, column_weight, *options):
    """(loss, row lse, row t, column lse, column t): the loss has a gradient where there are
    weights, the others where there are none."""
    tensors = (x, y, factor, bias, of.target, of.column_labels, mask, of.positives)
    shares = (of.row_share, of.column_share, row_weight, column_weight)
    arguments = (*tensors, *shares, *options, of.exclude_diagonal)
    if transformed():
        return formula.pairwise_cross_entropy(*arguments)
    wanted = any(t is not None and t.requires_grad for t in (x, y, factor, bias))
    save = row_weight is not None and torch.is_grad_enabled() and wanted
    return forward(*arguments, save and _rows_fit(x, y, of.column_share is not None))[:5]


def _rows_fit(x: Tensor, y: Tensor, columns: bool) -> bool:
    """Whether the forward can form the gradient: of columns it needs all rows at once."""
    rows = x.shape[0] if columns else LEAST_ROWS
    wide = 8 if x.dtype == torch.float64 else 4
    return rows * y.shape[0] * wide <= ROW_BYTES


def _sizes(x, y, factor, bias, save):
    """Saved gradients are sums: in the accumulation dtype, rounded once by the backward."""
    (N, D), M = x.shape, y.shape[0]
    scalar = () if factor is not None and save else (0,)
    if not save:
        return (0,), (0,), scalar, (0,)
    return (N, D), (M, D), scalar, (M,) if bias is not None else (0,)


def _fake(x, y, factor, bias, target, column_labels, mask, positives, row_share, column_share, *o):
    new = lambda *shape: x.new_empty(shape, dtype=accumulation(x.dtype))  # noqa: E731
    N, M = x.shape[0], 0 if column_share is None else y.shape[0]
    saved = (new(*size) for size in _sizes(x, y, factor, bias, o[-1]))
    return new(), new(N), new(N), new(M), new(M), *saved


def _reference(*args):
    *inputs, save = args
    results = formula.pairwise_cross_entropy(*inputs)
    if not save:
        return *(r.contiguous() for r in results), *(results[0].new_empty(0) for _ in range(4))
    x, y = formula.upcast(*inputs[:2])
    grad = results[0].new_ones(())
    saved = formula.pairwise_cross_entropy_backward(x, y, *inputs[2:], grad, *[None] * 4)
    return *(r.contiguous() for r in results), *(s.contiguous() for s in saved)


def _fake_backward(x, y, factor, bias, *_):
    dtype = accumulation(x.dtype)
    of_factor = x.new_empty(() if factor is not None else (0,), dtype=dtype)
    of_bias = x.new_empty((y.shape[0],) if bias is not None else (0,), dtype=dtype)
    return x.new_empty(x.shape), y.new_empty(y.shape), of_factor, of_bias


def _formula_backward(*args):
    """Without what the forward kept: row and column lse, four gradients."""
    return formula.pairwise_cross_entropy_backward(*args[:18], *args[24:])


def _reference_backward(*args):
    grads = formula.pairwise_cross_entropy_backward(*args[:18], *args[24:], *args[18:20])
    return tuple(grad.contiguous() for grad in grads)


_INPUTS = (
    "Tensor x, Tensor y, Tensor? factor, Tensor? bias, Tensor target, Tensor? column_labels, "
    "Tensor? mask, Tensor? positives, Tensor row_share, Tensor? column_share, Tensor? row_weight, "
    "Tensor? column_weight, float scale, float softcap, float margin, float uniform, bool sigmoid, "
    "bool exclude_diagonal"
)
_SAVED = "Tensor saved_x, Tensor saved_y, Tensor saved_factor, Tensor saved_bias"
forward = Op(
    "pairwise_cross_entropy",
    f"({_INPUTS}, bool save) -> (Tensor loss, Tensor row_lse, Tensor row_target, "
    f"Tensor column_lse, Tensor column_target, {_SAVED})",
    family="pairwise",
    fake=_fake,
    implementations=[
        cpu("pairwise_cross_entropy"),
        triton("pairwise.cross_entropy", "pairwise_cross_entropy"),
        reference(_reference),
    ],
)
backward = Op(
    "pairwise_cross_entropy_backward",
    f"({_INPUTS}, Tensor row_lse, Tensor column_lse, {_SAVED}, Tensor? grad_loss, "
    "Tensor? grad_row_lse, Tensor? grad_row_target, Tensor? grad_column_lse, "
    "Tensor? grad_column_target) -> (Tensor grad_x, Tensor grad_y, Tensor grad_factor, "
    "Tensor grad_bias)",
    family="pairwise",
    fake=_fake_backward,
    implementations=[
        cpu("pairwise_cross_entropy_backward"),
        triton("pairwise.cross_entropy", "pairwise_cross_entropy_backward"),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    loss, row_lse, row_target, column_lse, column_target, *saved = output
    ctx.weighted = inputs[10] is not None
    sums = (row_lse, row_target, column_lse, column_target)
    ctx.mark_non_differentiable(*saved, *(sums if ctx.weighted else (loss,)))
    ctx.save_for_backward(*inputs[:12], row_lse, column_lse, *saved)
    ctx.options = inputs[12:18]


def _gradient(ctx, grad_loss, *grads):
    tensors = ctx.saved_tensors
    upstream = (grad_loss, *[None] * 4) if ctx.weighted else (None, *grads[:4])
    results = backward(*tensors[:12], *ctx.options, *tensors[12:], *upstream)
    given = [None if t is None else g for t, g in zip(tensors[:4], results, strict=True)]
    return *given, *[None] * 15


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(
    backward, _formula_backward, arguments=[0, 1, 2, 3, 24, 25, 26, 27, 28]
)
