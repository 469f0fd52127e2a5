"""Cases of matching with a dustbin."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_log_optimal_transport(scores, dustbin_score, iterations, lengths=None):
    """SuperGlue's loop: the extended scores, and two logsumexp an iteration."""
    B, N, M = scores.shape
    rows, columns = lengths or (None, None)
    m = torch.full((B,), N, device=scores.device) if rows is None else rows
    n = torch.full((B,), M, device=scores.device) if columns is None else columns
    bins = dustbin_score.to(scores.dtype).expand(B)[:, None, None]
    Z = torch.cat([scores, bins.expand(B, N, 1)], 2)
    Z = torch.cat([Z, bins.expand(B, 1, M + 1)], 1)
    row = torch.arange(N + 1, device=scores.device)[None]
    column = torch.arange(M + 1, device=scores.device)[None]
    row, column = (row < m[:, None]) | (row == N), (column < n[:, None]) | (column == M)
    Z = torch.where(row[:, :, None] & column[:, None], Z, -torch.inf)
    norm = -(m + n).to(scores.dtype).log()[:, None]
    log_m, log_n = m.to(scores.dtype).log()[:, None], n.to(scores.dtype).log()[:, None]
    log_mu = torch.cat([norm.expand(B, N), norm + log_n], 1)
    log_nu = torch.cat([norm.expand(B, M), norm + log_m], 1)
    u, v = torch.zeros_like(log_mu), torch.zeros_like(log_nu)
    for _ in range(iterations):
        u = log_mu - torch.where(row, _logsumexp(Z + v[:, None], 2, row), 0)
        v = log_nu - torch.where(column, _logsumexp(Z + u[:, :, None], 1, column), 0)
    total = Z + u[:, :, None] + v[:, None] - norm[:, :, None]
    return torch.where(Z == -torch.inf, -torch.inf, total)


def _logsumexp(x, dim, real):
    """Without the NaN gradient of rows that are −∞ throughout."""
    return torch.where(real.unsqueeze(dim), x, 0).logsumexp(dim)


def _scores(B, N, M, scale=1.0, view=None, shared=True):
    def make(dtype, device):
        scores = scale * randn(B, N, M, dtype=torch.float64)
        bins = randn(1 if shared else B, dtype=torch.float64, seed=1)
        bins = bins[0] if shared else bins
        scores, bins = scores.to(device, dtype), bins.to(device, dtype)
        return (view(scores) if view else scores), bins

    return make


def _bad(error, match, scores=(2, 3, 4), dtype=torch.float32, bins=0.5, iterations=3, **options):
    make = lambda: (torch.zeros(scores, dtype=dtype), bins, iterations)  # noqa: E731
    return BadInput(make, error, match, options)


def _matching(B, N, iterations, quick=False):
    entries = B * N * N
    return Workload(
        f"{B} of {N} x {N}, {iterations} iterations",
        _scores(B, N, N, scale=4.0),
        flops=4.0 * entries * iterations,
        backward_flops=8.0 * entries * iterations,
        bytes=lambda size: 2 * size * entries,
        options={"iterations": iterations},
        quick=quick,
    )


LOG_OPTIMAL_TRANSPORT = OpCases(
    name="log_optimal_transport",
    plain=plain_log_optimal_transport,
    samples=[
        Sample("plain", _scores(3, 9, 11), {"iterations": 4}),
        Sample("one_entry", _scores(1, 1, 1), {"iterations": 4}),
        Sample("a_bin_each", _scores(2, 17, 9, shared=False), {"iterations": 11}),
        Sample(
            "ragged",
            _scores(3, 9, 8, shared=False),
            {
                "iterations": 5,
                "lengths": (torch.tensor([4, 9, 1]), torch.tensor([5, 2, 8])),
            },
        ),
        Sample("strided", _scores(8, 9, 12, view=lambda s: s.mT[::2, ::2]), {"iterations": 3}),
        Sample("no_problems", _scores(0, 3, 4), {"iterations": 2}),
    ],
    workloads=[
        _matching(1, 512, 20, quick=True),
        _matching(1, 2048, 100),
    ],
    bad=[
        _bad(ValueError, r"scores must be \(B, N, M\)", scores=(4,)),
        _bad(TypeError, "scores must be float64", dtype=torch.int64),
        _bad(ValueError, "dustbin_score must be a number", bins=torch.zeros(3)),
        _bad(
            TypeError, "dustbin_score must have the dtype", bins=torch.zeros((), dtype=torch.half)
        ),
        _bad(ValueError, "iterations must be an integer", iterations=0),
        _bad(TypeError, "lengths must be a pair", lengths=torch.tensor([1, 2])),
        _bad(ValueError, r"rows must be in \[0, 3\]", lengths=(torch.tensor([1, 4]), None)),
    ],
)

CASES = [LOG_OPTIMAL_TRANSPORT]
