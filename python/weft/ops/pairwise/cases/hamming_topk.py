"""Cases of the search of binary codes."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload
from weft.ops.pairwise.hamming_topk import CODES
from weft.reference.pairwise.hamming_topk import bits_of


def plain_hamming_topk(queries, database, k=1):
    """Distances of bits as a product of zeros and ones, then topk with the index as tie-break."""
    q, c = bits_of(queries), bits_of(database)
    d = (q.sum(1)[:, None] + c.sum(1) - 2 * q @ c.mT).long()
    M = c.shape[0]
    keys = d * (M + 1) + torch.arange(M, device=d.device)
    keys = keys.topk(min(k, M), largest=False).values
    missing = (0, k - keys.shape[1])
    distances = torch.nn.functional.pad(keys // (M + 1), missing, value=2**31 - 1)
    indices = torch.nn.functional.pad(keys % (M + 1), missing, value=-1)
    return distances.to(torch.int32), indices


def _codes(N, M, W, view=None, high=256):
    def make(dtype, device):
        generator = torch.Generator().manual_seed(0)
        q, c = (
            torch.randint(0, high, (n, W), generator=generator, dtype=torch.uint8).to(device)
            for n in (N, M)
        )
        return view(q, c) if view else (q, c)

    return make


def _bad(error, match, queries=None, database=None, **options):
    q = torch.zeros(3, 4, dtype=torch.uint8) if queries is None else queries
    c = torch.zeros(5, 4, dtype=torch.uint8) if database is None else database
    return BadInput(lambda: (q, c), error, match, options)


def _search(N, M, bits, k, quick=False):
    W = bits // 8
    return Workload(
        f"{N} of {M:,}, {bits} bits, k={k}",
        _codes(N, M, W),
        flops=0,
        bytes=lambda _: (N + M) * W + 12 * N * k,
        options={"k": k},
        quick=quick,
    )


HAMMING_TOPK = OpCases(
    name="hamming_topk",
    plain=plain_hamming_topk,
    samples=[
        Sample("nearest", _codes(5, 7, 4)),
        Sample("several", _codes(5, 70, 3), {"k": 3}),
        Sample("prime", _codes(37, 641, 13), {"k": 5}),
        Sample("ties", _codes(9, 300, 1, high=2), {"k": 4}),
        Sample("fewer_than_k", _codes(3, 2, 8), {"k": 4}),
        Sample("one_byte", _codes(1, 1, 1)),
        Sample("many_of_few_queries", _codes(2, 3001, 32), {"k": 2}),
        Sample("sliced", _codes(8, 20, 16, view=lambda q, c: (q[::2, ::2], c[1::3, 1::2]))),
        Sample("expanded", _codes(1, 1, 5, view=lambda q, c: (q.expand(3, 5), c.expand(9, 5)))),
        Sample("no_queries", _codes(0, 7, 4)),
        Sample("no_codes", _codes(5, 0, 4), {"k": 2}),
        Sample("no_bits", _codes(3, 4, 0), {"k": 2}),
    ],
    workloads=[
        _search(100, 10_000, 256, 10, quick=True),
        _search(1000, 100_000, 256, 10),
        _search(1000, 100_000, 64, 10),
    ],
    bad=[
        _bad(TypeError, "queries must be a uint8", queries=torch.zeros(3, 4)),
        _bad(TypeError, "database must be a uint8", database=torch.zeros(3, 4, dtype=torch.int8)),
        _bad(ValueError, "queries must be 2-d", queries=torch.zeros(4, dtype=torch.uint8)),
        _bad(ValueError, "codes of 4 bytes", database=torch.zeros(5, 3, dtype=torch.uint8)),
        _bad(ValueError, "k must be >= 1", k=0),
        _bad(TypeError, "k must be an integer", k=1.5),
    ],
    differentiable=False,
    dtypes=CODES,
)

CASES = [HAMMING_TOPK]
