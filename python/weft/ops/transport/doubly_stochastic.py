"""Doubly stochastic matrices by a fixed number of normalisations (Sinkhorn and Knopp)."""

import math
from numbers import Integral

from torch import Tensor
from torch.distributed import ProcessGroup

from weft.dispatch import transformed
from weft.ops.checks import check_float
from weft.ops.registration import (
    Op,
    cpu,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.ops.transport.doubly_stochastic_group import over_group
from weft.reference.transport import doubly_stochastic as formula

LEAST_STABILIZER = 1e-12
LANES_UP_TO = 8  # rows and columns of the matrices that stay in registers


def doubly_stochastic(
    scores: Tensor,
    iterations: int,
    *,
    epsilon: float = 1.0,
    last: str = "rows",
    stabilizer: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""exp(scores / epsilon) with its rows and columns normalised in turn, ``iterations`` times.

    .. math::
        Q \leftarrow e^{S / \varepsilon}, \quad \text{then } T \text{ times} \quad
        Q_{ij} \leftarrow \tfrac{N}{M}\, Q_{ij} / \textstyle\sum_i Q_{ij}, \quad
        Q_{ij} \leftarrow Q_{ij} / \sum_j Q_{ij}

    for ``last="rows"``: the columns come first, the rows sum to 1 in the end. For
    ``last="columns"`` the rows come first, set to M/N, and the columns sum to 1 in the end. With a
    ``stabilizer`` s > 0 the first normalisation, whose sums are a, is :math:`a\,
    \mathrm{softmax}(S / \varepsilon) + s` along that axis, and every later one divides by its sum
    plus s.

    It is computed with shifts that keep every exponent in range, as long as scores / epsilon are
    finite: nothing overflows, and no line vanishes that has a finite score.

    Args:
        scores: ``(..., N, M)``. −inf is an entry of 0; a row or a column of −inf alone gives
            zeros (``stabilizer``: s before the later normalisations), with gradients of 0. NaN
            and +inf make their matrix NaN.
        iterations: T >= 1, of two normalisations each.
        epsilon: the temperature, > 0.
        last: the axis that is normalised last, exactly: ``"rows"`` or ``"columns"``.
        stabilizer: s, 0 or at least 1e-12.
        group: the rows of all ranks of this process group, which may have different numbers of
            them, are those of one matrix: one sum of M numbers over the group in each iteration.
            The scores are in the same shape but for N; ``last="rows"``, no stabilizer, and no
            gradient.

    Returns:
        ``(..., N, M)``, contiguous, in the dtype of ``scores``: float64, float32, bfloat16 or
        float16; half precision computes in float32. Differentiable twice, through the T
        iterations as they are.

    Raises:
        ValueError: shapes, ``iterations``, ``epsilon``, ``last`` or ``stabilizer`` out of range;
            a group with what it does not take.
        TypeError: dtypes that are not supported.

    Source: Sinkhorn and Knopp, "Concerning nonnegative matrices and doubly stochastic matrices",
    1967. ``last="rows"`` with samples as rows is the assignment of SwAV (Caron et al., 2020;
    epsilon 0.05, 3 iterations) and DINOv2 (Oquab et al., 2024); ``last="columns"`` with a
    stabilizer of 1e-6 and 20 iterations are the connections of mHC (Xie et al., 2026) as the
    DeepSeek V4 models compute them.
    """
    check_float(scores=scores)
    if scores.dim() < 2:
        raise ValueError(f"scores must be (..., N, M), got {tuple(scores.shape)}")
    if not isinstance(iterations, Integral) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations must be an integer >= 1, got {iterations!r}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be > 0 and finite, got {epsilon}")
    if last not in ("rows", "columns"):
        raise ValueError(f"last must be 'rows' or 'columns', got {last!r}")
    if stabilizer and not LEAST_STABILIZER <= stabilizer < math.inf:
        raise ValueError(f"stabilizer must be 0 or >= {LEAST_STABILIZER}, got {stabilizer}")
    if group is not None:
        if last != "rows" or stabilizer:
            raise ValueError("group goes with last='rows' and no stabilizer")
        return over_group(scores, iterations, epsilon, group)
    run = formula.doubly_stochastic if transformed() else forward
    N, M = scores.shape[-2:]
    matrices = scores.reshape(scores.shape[:-2].numel(), N, M)
    options = float(epsilon), int(iterations), last == "rows", float(stabilizer)
    return run(matrices, *options).reshape(scores.shape)


def _fake(scores, epsilon, iterations, last_rows, stabilizer):
    return scores.new_empty(scores.shape)


def _reference(scores, *options):
    return formula.doubly_stochastic(scores, *options).contiguous()


def _fake_backward(grad, scores, epsilon, iterations, last_rows, stabilizer):
    return scores.new_empty(scores.shape)


def _reference_backward(grad, scores, *options):
    return formula.doubly_stochastic_backward(grad, scores, *options).contiguous()


def _refuses(scores, epsilon, iterations, last_rows, stabilizer):
    N, M = scores.shape[-2:]
    if stabilizer and max(N, M) > LANES_UP_TO:
        return f"a stabilizer goes with matrices of at most {LANES_UP_TO} x {LANES_UP_TO}"
    return None


def _refuses_backward(grad, *args):
    return _refuses(*args)


OPTIONS = "float epsilon, int iterations, bool last_rows, float stabilizer"

forward = Op(
    "doubly_stochastic",
    f"(Tensor scores, {OPTIONS}) -> Tensor",
    family="transport",
    fake=_fake,
    implementations=[
        cpu("doubly_stochastic", _refuses),
        triton("transport.doubly_stochastic", "doubly_stochastic", _refuses),
        reference(_reference),
    ],
)
backward = Op(
    "doubly_stochastic_backward",
    f"(Tensor grad, Tensor scores, {OPTIONS}) -> Tensor",
    family="transport",
    fake=_fake_backward,
    implementations=[
        cpu("doubly_stochastic_backward", _refuses_backward),
        triton("transport.doubly_stochastic", "doubly_stochastic_backward", _refuses_backward),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    scores, *ctx.options = inputs
    ctx.save_for_backward(scores)


def _gradient(ctx, grad):
    return backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(
    backward, lambda *args: (formula.doubly_stochastic_backward(*args),), arguments=[0, 1]
)
