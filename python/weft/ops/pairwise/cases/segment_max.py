"""Cases of the maxima over segments of rows: late interaction and prototypes."""

import torch

from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_maxsim(
    queries,
    documents,
    query_lengths=None,
    document_lengths=None,
    pad="neg_inf",
    *,
    document_offsets=None,
):
    """All similarities of tokens by einsum, then the maximum and the sum."""
    if document_offsets is not None:
        one = lambda d: plain_maxsim(queries, d[None], query_lengths)[:, 0]  # noqa: E731
        return torch.stack([one(d) for d in documents.split(document_offsets.diff().tolist())], 1)
    behind = lambda t, n: torch.arange(t.shape[1], device=t.device) >= n[:, None]  # noqa: E731
    if query_lengths is not None:
        queries = queries.masked_fill(behind(queries, query_lengths)[..., None], 0)
    if document_lengths is not None:
        padding = behind(documents, document_lengths)
        documents = documents.masked_fill(padding[..., None], 0)
    s = torch.einsum("qid,njd->qnij", queries, documents)
    if document_lengths is not None and pad == "neg_inf":
        s = s.masked_fill(padding[:, None], -torch.inf)
    return s.amax(-1).sum(-1)


def plain_prototype_similarity(
    features, prototypes, activation="log", pool="max", *, eps=1e-4, gamma=1.0
):
    """As the original: distances by convolution, ReLU, minimum over the map, activation."""
    x, p = features, prototypes
    squares = x.square().sum(1)[:, None] + p.square().sum(1)[:, None, None]
    d = torch.relu(squares - 2 * torch.conv2d(x, p[:, :, None, None])).flatten(2)
    d, position = d.min(-1)
    if activation == "log":
        return ((d + 1) / (d + eps)).log(), position
    return (-d if activation == "linear" else (-gamma * d).exp()), position


def _tokens(Q, Lq, N, Ld, D, view=None):
    def make(dtype, device):
        queries = randn(Q, Lq, D, dtype=dtype, device=device)
        documents = randn(N, Ld, D, dtype=dtype, device=device, seed=1)
        return view(queries, documents) if view else (queries, documents)

    return make


QUERY_LENGTHS, DOCUMENT_LENGTHS = torch.tensor([3, 1]), torch.tensor([5, 1, 6, 2])
LENGTHS = {"query_lengths": QUERY_LENGTHS, "document_lengths": DOCUMENT_LENGTHS}
OFFSETS = torch.tensor([0, 4, 5, 11, 24])


def _padding_is_nan(queries, documents):
    device = queries.device
    for tokens, lengths in ((queries, QUERY_LENGTHS), (documents, DOCUMENT_LENGTHS)):
        tokens[torch.arange(tokens.shape[1], device=device) >= lengths.to(device)[:, None]] = (
            torch.nan
        )
    return queries, documents


MAXSIM_SAMPLES = [
    Sample("plain", _tokens(2, 2, 3, 4, 3)),
    Sample("lengths", _tokens(2, 3, 4, 6, 2), LENGTHS),
    Sample("padding_is_nan", _tokens(2, 3, 4, 6, 2, view=_padding_is_nan), LENGTHS),
    Sample("zero", _tokens(2, 3, 4, 6, 2), {**LENGTHS, "pad": "zero"}),
    Sample(
        "packed",
        _tokens(2, 3, 4, 6, 2, view=lambda q, d: (q, d.flatten(0, 1))),
        {"query_lengths": QUERY_LENGTHS, "document_offsets": OFFSETS},
    ),
    Sample("one", _tokens(1, 1, 1, 1, 1), {"pad": "zero"}),
    Sample("prime", _tokens(3, 17, 5, 41, 67)),
    Sample("long", _tokens(1, 2, 2, 1100, 3)),
    Sample(
        "sliced",
        _tokens(4, 6, 4, 10, 8, view=lambda q, d: (q[::2, ::2, ::2], d[1:, ::2, 1::2])),
    ),
    Sample(
        "transposed",
        _tokens(2, 3, 4, 3, 2, view=lambda q, d: (q, d.transpose(0, 1))),
        {"pad": "zero"},
    ),
    Sample(
        "expanded", _tokens(1, 3, 1, 4, 5, view=lambda q, d: (q.expand(2, 3, 5), d.expand(3, 4, 5)))
    ),
    Sample("no_documents", _tokens(2, 3, 0, 4, 5)),
    Sample("no_queries", _tokens(0, 3, 4, 5, 6)),
    Sample("no_query_tokens", _tokens(2, 0, 4, 5, 6), {"pad": "zero"}),
]


def _bad_tokens(error, match, queries=(2, 3, 6), documents=(4, 5, 6), **options):
    make = lambda: (torch.ones(queries), torch.ones(documents))  # noqa: E731
    return BadInput(make, error, match, options)


def _late_interaction(Q, Lq, N, Ld, D, quick=False):
    return Workload(
        f"Q={Q}x{Lq} N={N}x{Ld} D={D}",
        _tokens(Q, Lq, N, Ld, D),
        flops=2.0 * Q * Lq * N * Ld * D,
        backward_flops=4.0 * Q * Lq * N * D,
        bytes=lambda size: size * (Q * Lq * D + N * Ld * D + Q * N),
        quick=quick,
    )


int64 = torch.tensor

MAXSIM = OpCases(
    name="maxsim",
    plain=plain_maxsim,
    samples=MAXSIM_SAMPLES,
    workloads=[
        _late_interaction(1, 32, 100, 256, 128, quick=True),
        _late_interaction(1, 32, 1000, 1024, 128),
        _late_interaction(16, 32, 200, 300, 128),
    ],
    bad=[
        _bad_tokens(ValueError, r"queries must be \(Q, Lq, D\)", queries=(3, 6)),
        _bad_tokens(ValueError, r"documents must be \(N, Ld, D\)", documents=(5, 6)),
        _bad_tokens(ValueError, "D = 6", documents=(4, 5, 7)),
        _bad_tokens(ValueError, "pad must be one of", pad="half"),
        _bad_tokens(TypeError, "query_lengths must be an int64", query_lengths=torch.ones(2)),
        _bad_tokens(ValueError, r"query_lengths must be \(2,\)", query_lengths=int64([1])),
        _bad_tokens(ValueError, r"in \[0, 3\], got 1 to 4", query_lengths=int64([1, 4])),
        _bad_tokens(ValueError, r"in \[0, 5\], got -1", document_lengths=int64([1, -1, 5, 5])),
        _bad_tokens(ValueError, r"documents must be \(T, D\)", document_offsets=int64([0, 4])),
        _bad_tokens(
            TypeError,
            "document_offsets must be an int64",
            documents=(5, 6),
            document_offsets=torch.ones(2),
        ),
        _bad_tokens(ValueError, "from 0 to 5", documents=(5, 6), document_offsets=int64([0, 3, 4])),
        _bad_tokens(
            ValueError, "with a fall", documents=(5, 6), document_offsets=int64([0, 3, 1, 5])
        ),
        _bad_tokens(
            ValueError, "no padding", documents=(5, 6), document_offsets=int64([0, 5]), pad="zero"
        ),
    ],
)


def _maps(B, D, H, W, P, view=None):
    def make(dtype, device):
        features = randn(B, D, H, W, dtype=dtype, device=device)
        prototypes = randn(P, D, dtype=dtype, device=device, seed=1)
        return view(features, prototypes) if view else (features, prototypes)

    return make


PROTOTYPE_SAMPLES = [
    Sample("plain", _maps(2, 3, 2, 2, 4)),
    Sample("linear", _maps(2, 3, 2, 2, 4), {"activation": "linear"}),
    Sample("rbf", _maps(2, 3, 2, 2, 4), {"activation": "rbf", "gamma": 0.25}),
    Sample("eps", _maps(2, 3, 2, 2, 4), {"eps": 0.5}),
    Sample("one", _maps(1, 1, 1, 1, 1)),
    Sample("prime", _maps(3, 37, 5, 7, 41)),
    Sample(
        "channels_last",
        _maps(2, 3, 2, 3, 4, view=lambda x, p: (x.to(memory_format=torch.channels_last), p)),
    ),
    Sample("sliced", _maps(4, 8, 6, 4, 6, view=lambda x, p: (x[::2, ::2, ::2], p[::2, 1::2]))),
    Sample("no_images", _maps(0, 4, 2, 3, 5)),
]


def _bad_maps(error, match, features=(3, 4, 2, 3), prototypes=(5, 4), **options):
    make = lambda: (torch.ones(features), torch.ones(prototypes))  # noqa: E731
    return BadInput(make, error, match, options)


def _head(B, D, H, W, P, quick=False):
    return Workload(
        f"B={B} D={D} {H}x{W} P={P}",
        _maps(B, D, H, W, P),
        flops=2.0 * B * H * W * D * P,
        backward_flops=4.0 * B * D * P,
        bytes=lambda size: size * (B * D * H * W + P * D + B * P) + 8 * B * P,
        quick=quick,
    )


PROTOTYPE_SIMILARITY = OpCases(
    name="prototype_similarity",
    plain=plain_prototype_similarity,
    samples=PROTOTYPE_SAMPLES,
    workloads=[
        _head(16, 128, 7, 7, 200, quick=True),
        _head(80, 128, 7, 7, 2000),
    ],
    bad=[
        _bad_maps(ValueError, r"features must be \(B, D, H, W\)", features=(3, 4, 2)),
        _bad_maps(ValueError, r"prototypes must be \(P, D\)", prototypes=(5, 4, 1)),
        _bad_maps(ValueError, "D = 4", prototypes=(5, 3)),
        _bad_maps(ValueError, "activation must be one of", activation="relu"),
        _bad_maps(ValueError, "pool must be max", pool="mean"),
        _bad_maps(ValueError, "eps must be", eps=0.0),
        _bad_maps(ValueError, "gamma must be", gamma=-1.0),
    ],
)

CASES = [MAXSIM, PROTOTYPE_SIMILARITY]
