"""Matching with a dustbin: so many iterations of Sinkhorn on scores, as SuperGlue has them."""

import torch
from torch import Tensor

from weft.ops.transport.problem import check_cost, check_lengths, wide_dtype
from weft.ops.transport.sinkhorn import plan_of, solved
from weft.reference.transport.dense import Problem
from weft.reference.transport.sinkhorn import Settings


def log_optimal_transport(
    scores: Tensor,
    dustbin_score: Tensor | float,
    iterations: int,
    lengths: tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    r"""The logarithm of a soft matching with dustbins, after so many iterations of Sinkhorn.

    The scores S of m rows and n columns get one more row and one more column, the dustbins, of
    ``dustbin_score``. With μ = (1, …, 1, n) / (m + n), ν = (1, …, 1, m) / (m + n) and u = v = 0

    .. math::
        u_i \leftarrow \log \mu_i - \log \sum_j e^{S_{ij} + v_j}, \qquad
        v_j \leftarrow \log \nu_j - \log \sum_i e^{S_{ij} + u_i}, \qquad
        Z_{ij} = S_{ij} + u_i + v_j + \log(m + n)

    e^Z has columns that sum to 1 exactly, that of the dustbin to m, and rows that do once the
    iterations have converged.

    Args:
        scores: ``(B, N, M)`` or ``(N, M)``, any strides; −∞ forbids a pair. They are read where
            they are: the matrix with dustbins is never made.
        dustbin_score: of all entries of both dustbins: a number, or a tensor () or (B,), in the
            dtype of the scores or its wider one.
        iterations: ≥ 1, a row and a column update each.
        lengths: how many rows and columns of each problem are real, each ``(B,)`` int64 or None for
            all: m and n of that problem. What lies beyond is never read into a result.

    Returns:
        Z, ``(B, N + 1, M + 1)`` in the dtype of the scores, the dustbins last whatever the lengths;
        −∞ beyond the lengths. A padded problem has the Z of the one without padding. The gradient,
        in scores and dustbin_score, is that of exactly these iterations, and differentiable itself.

    Raises:
        ValueError: shapes, devices, ``iterations`` below 1, lengths out of range.
        TypeError: dtypes that differ or are not supported.

    Source: Sarlin et al., "SuperGlue: Learning Feature Matching with Graph Neural Networks", CVPR
    2020, sections 3.2 and A (log-domain iterations, dustbins).
    """
    single = isinstance(scores, Tensor) and scores.dim() == 2
    scores = check_cost("scores", scores)
    dustbin = check_score(dustbin_score, scores)
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations must be an integer >= 1, got {iterations!r}")
    rows, columns = check_lengths(lengths, scores)
    B, N, M = scores.shape
    a, b, log_total = marginals(B, N, M, rows, columns, dustbin)
    one = dustbin.new_ones(()).expand(B)
    p = Problem(scores, a, b, one, None, rows, columns, -dustbin[:, None].expand(B, 3), True)
    start = -torch.where(b > 0, b, 1).log()  # v = 0: weft's potentials leave out log b
    settings = Settings(torch.inf, torch.inf, iterations, -1.0, False, True)
    f, g, *_ = solved(p, start, settings, True)
    Z = plan_of(p, f + log_total[:, None], g, log=True)
    return Z[0] if single else Z


def check_score(score: Tensor | float, like: Tensor) -> Tensor:
    """(B,) in float32, of float64 scores float64."""
    wide = wide_dtype(like)
    if not isinstance(score, Tensor):
        score = torch.as_tensor(float(score), dtype=wide, device=like.device)
    if score.dtype not in (like.dtype, wide):
        raise TypeError(
            f"dustbin_score must have the dtype of the scores, {like.dtype}, or {wide}, "
            f"got {score.dtype}"
        )
    if score.shape not in ((), (like.shape[0],)) or score.device != like.device:
        raise ValueError(
            f"dustbin_score must be a number, () or ({like.shape[0]},) on {like.device}, "
            f"got {tuple(score.shape)} on {score.device}"
        )
    return score.to(wide).expand(like.shape[0])


def marginals(
    B: int, N: int, M: int, rows: Tensor | None, columns: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """μ (B, N + 1), ν (B, M + 1) and log(m + n) (B,); a problem without entries has weights 0."""
    m = like.new_full((B,), N) if rows is None else rows.to(like.dtype)
    n = like.new_full((B,), M) if columns is None else columns.to(like.dtype)
    share = 1 / (m + n).clamp_min(1)
    weights = []
    for count, own, other in ((N, m, n), (M, n, m)):
        real = torch.arange(count, device=like.device) < own[:, None]
        inside = torch.where(real, share[:, None], 0)
        weights.append(torch.cat([inside, (share * other)[:, None]], 1))
    return *weights, (m + n).clamp_min(1).log()
