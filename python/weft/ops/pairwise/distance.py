"""The matrix of all pairs of rows: distances, and the similarities of the algebra."""

from torch import Tensor

from weft.dispatch import transformed
from weft.ops.pairwise.dense import GRADIENTS, fake_gradients, only_wanted, or_none, wanted_of
from weft.ops.pairwise.nearest import wide_tensors
from weft.ops.pairwise.pairs import (
    SCHEMA,
    Operands,
    check_rows,
    hyperbolic_of_tensor,
    pair_of,
)
from weft.ops.pairwise.planner import BACKWARD, FORWARD, check_plan, planned_cpu
from weft.ops.pairwise.unit_rows import unit_rows
from weft.ops.registration import (
    Op,
    reference,
    register_gradient,
    register_gradient_by_reference,
    triton,
)
from weft.reference.pairwise import distance as formula
from weft.reference.pairwise.pairs import Pair

METRICS = ("sqeuclidean", "euclidean", "cosine", "l1", "mahalanobis", "poincare", "lorentz")


def pairwise_distance(
    x: Tensor,
    y: Tensor,
    metric: str = "sqeuclidean",
    *,
    curvature: float | Tensor = 1.0,
    precision: Tensor | None = None,
    plan: str = "auto",
) -> Tensor:
    r"""The matrix of distances between the rows of two matrices.

    .. math::
        \text{out}_{ij} = d(x_i, y_j)

    with d one of

    - sqeuclidean: :math:`\lVert x - y \rVert^2`; euclidean: its root; l1:
      :math:`\lVert x - y \rVert_1`
    - cosine: :math:`1 - \langle x, y \rangle / (\lVert x \rVert \lVert y \rVert)`, 1 for a zero
      vector
    - mahalanobis: :math:`\sqrt{(x - y)^\top P (x - y)}`, P = ``precision``
    - poincare: :math:`\text{arcosh}\bigl(1 + 2c \lVert x - y \rVert^2 / ((1 - c \lVert x \rVert^2)
      (1 - c \lVert y \rVert^2))\bigr) / \sqrt c`, c = ``curvature``
    - lorentz: :math:`\text{arcosh}(-c \langle x, y \rangle_L) / \sqrt c` on the hyperboloid
      :math:`\langle x, x \rangle_L = -x_0^2 + x_1^2 + \dots = -1/c`

    Points are moved by their mean before they are multiplied, and pairs so close that digits cancel
    are computed by their differences: data far from the origin keeps its digits, and the distance
    of equal rows is 0 (sqeuclidean, euclidean, l1, poincare).

    Args:
        x: ``(N, D)``, any strides.
        y: ``(M, D)``, any strides.
        metric: one of the above.
        curvature: of poincare and lorentz, > 0: a number, or a 0-d tensor that may require a
            gradient.
        precision: of mahalanobis, ``(D, D)`` symmetric positive definite, in the dtype of x.
        plan: auto, direct or fused, as in ``weft.pairwise``.

    Returns:
        ``(N, M)``, contiguous, in the dtype of x: float64, float32, bfloat16 or float16, the same
        as y; half precision accumulates in float32. Differentiable twice in x, y, ``curvature`` and
        ``precision``; where a distance that is no square is 0 its derivative is taken to be 0.

    Raises:
        ValueError: shapes or devices that do not match, an unknown metric or plan, parameters out
            of range.
        TypeError: dtypes that differ or are not supported.

    Source: Nickel and Kiela, "Poincaré Embeddings for Learning Hierarchical Representations",
    NeurIPS 2017, equation 1, and "Learning Continuous Hierarchies in the Lorentz Model of
    Hyperbolic Geometry", ICML 2018, equation 5; for the rest ``torch.cdist`` is the model.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    factor = None
    if metric == "cosine":
        check_rows(x, y)
        pair = Pair("dot", scale=-1.0, shift=1.0)
        operands = Operands(unit_rows(x), unit_rows(y), pair)
    elif isinstance(curvature, Tensor) and metric in ("poincare", "lorentz"):
        operands, factor = hyperbolic_of_tensor(metric, x, y, curvature)
    else:
        operands = pair_of(metric, x, y, curvature=curvature, precision=precision)
    return matrix(operands, factor, plan)


def matrix(operands: Operands, factor: Tensor | None, plan: str) -> Tensor:
    """All values of a pair function, times a factor that it leaves to the caller."""
    o = operands
    check_plan(plan, o.x.device, o.pair.base)
    if transformed():
        s = formula.pairwise_matrix(o.x, o.y, o.row_factor, o.column_factor, o.bias, o.pair)
    else:
        s = forward(*wide_tensors(o), plan)
    return s if factor is None else (factor * s).to(s.dtype)


def _fake(x, y, *rest):
    return x.new_empty(x.shape[0], y.shape[0])


def _reference(x, y, row_factor, column_factor, bias, *rest):
    *pair, plan = rest
    factors = (row_factor, column_factor, bias)
    return formula.pairwise_matrix(x, y, *factors, Pair(*pair)).contiguous()


def _fake_backward(grad, *rest):
    return fake_gradients(rest[:5], rest[-2])


def _formula_backward(grad, *rest):
    *tensors_and_pair, wanted, plan = rest
    tensors, pair = tensors_and_pair[:5], tensors_and_pair[5:]
    grads = formula.pairwise_matrix_backward(grad, *tensors, Pair(*pair))
    return only_wanted(grads, tensors, wanted)


def _reference_backward(*args):
    return tuple(g.contiguous() for g in _formula_backward(*args))


forward = Op(
    "pairwise_matrix",
    f"({SCHEMA}, str plan) -> Tensor",
    family="pairwise",
    fake=_fake,
    implementations=[
        planned_cpu("pairwise_matrix", 0, FORWARD),
        triton("pairwise.distance", "pairwise_matrix"),
        reference(_reference),
    ],
)
backward = Op(
    "pairwise_matrix_backward",
    f"(Tensor grad, {SCHEMA}, int wanted, str plan) -> {GRADIENTS}",
    family="pairwise",
    fake=_fake_backward,
    implementations=[
        planned_cpu("pairwise_matrix_backward", 1, BACKWARD),
        triton("pairwise.distance", "pairwise_matrix_backward"),
        reference(_reference_backward),
    ],
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.pair, ctx.plan = inputs[5:10], inputs[10]


def _gradient(ctx, grad):
    tensors = ctx.saved_tensors
    wanted = wanted_of(ctx, tensors)
    grads = backward(grad, *tensors, *ctx.pair, wanted, ctx.plan)
    return *or_none(grads, tensors, wanted), *[None] * 6


register_gradient(forward, _setup, _gradient)
register_gradient_by_reference(backward, _formula_backward, arguments=[0, 1, 2, 3, 4, 5])
