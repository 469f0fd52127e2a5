"""Cases of attention of packed sequences."""

import torch

from weft import masks
from weft.ops.attention.cases.inputs import plain_attention
from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def plain_attention_varlen(
    query,
    key,
    value,
    query_offsets,
    key_offsets,
    max_query_length,
    max_key_length,
    *,
    mask=None,
    scale=None,
    sink=None,
    key_weight=None,
    enable_gqa=False,
    dropout_p=0.0,
    return_lse=False,
    return_key_sums=False,
    query_weight=None,
    softcap=0.0,
    seed=None,
):
    """One sequence after the other."""
    lists = (query_offsets.tolist(), key_offsets.tolist())
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    empty = [query.new_zeros(query.shape[:2] + value.shape[2:])]
    empty += [query.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=wide)] * return_lse
    out = [e.clone() for e in empty]
    for a, b, c, d in zip(lists[0], lists[0][1:], lists[1], lists[1][1:], strict=False):
        one = plain_attention(
            query[a:b].transpose(0, 1)[None],
            key[c:d].transpose(0, 1)[None],
            value[c:d].transpose(0, 1)[None],
            mask=mask,
            scale=scale,
            enable_gqa=enable_gqa,
            softcap=softcap,
            return_lse=return_lse,
        )
        results = one if return_lse else (one,)
        out[0][a:b] = results[0][0].transpose(0, 1)
        if return_lse:
            out[1][:, a:b] = results[1][0]
    return tuple(out) if return_lse else out[0]


def _packed(query_offsets, key_offsets, H, D, Hkv=None, tail=0):
    def make(dtype, device):
        Tq, Tk = query_offsets[-1] + tail, key_offsets[-1] + tail
        return (
            randn(Tq, H, D, dtype=dtype, device=device),
            randn(Tk, Hkv or H, D, dtype=dtype, device=device, seed=1),
            randn(Tk, Hkv or H, D, dtype=dtype, device=device, seed=2),
            torch.tensor(query_offsets, device=device),
            torch.tensor(key_offsets, device=device),
            max(b - a for a, b in zip(query_offsets, query_offsets[1:], strict=False)),
            max(b - a for a, b in zip(key_offsets, key_offsets[1:], strict=False)),
        )

    return make


SAMPLES = [
    Sample("plain", _packed([0, 3, 8], [0, 4, 6], 2, 4)),
    Sample("beside_sequences", _packed([0, 3, 3, 8], [0, 4, 6, 6], 2, 4, tail=2)),
    Sample(
        "causal",
        _packed([0, 30, 31, 100], [0, 40, 70, 110], 2, 8),
        {"mask": masks.Causal(2), "return_lse": True},
    ),
    Sample(
        "shared_heads",
        _packed([0, 20, 33], [0, 20, 33], 4, 6, Hkv=2),
        {"mask": masks.Window(4, 1), "enable_gqa": True},
    ),
]
DOCUMENTS = [0, 700, 2748, 3000, 5100, 7100, 9000, 9500, 12000, 14048, 16000, 16384]
FEW = [0, 100, 164, 500, 700, 1024]


def _causal(name: str, offsets: list[int], H: int, D: int, quick: bool) -> Workload:
    """Each document by itself: half of the pairs of its tokens."""
    pairs = sum((b - a) ** 2 for a, b in zip(offsets, offsets[1:], strict=False)) / 2
    return Workload(
        name,
        _packed(offsets, offsets, H, D),
        4 * H * D * pairs,
        lambda item: 4 * offsets[-1] * H * D * item,
        {"mask": masks.Causal()},
        backward_flops=10 * H * D * pairs,
        quick=quick,
    )


WORKLOADS = [
    _causal("documents, 1k tokens, causal", FEW, 4, 64, quick=True),
    _causal("documents, 16k tokens, causal", DOCUMENTS, 4, 64, quick=False),
]


def _bad(error, match, change, **options) -> BadInput:
    def make():
        args = list(_packed([0, 3, 8], [0, 4, 6], 2, 4)(torch.float32, "cpu"))
        for n, value in change.items():
            args[n] = value
        return tuple(args)

    return BadInput(make, error, match, options)


BAD = [
    _bad(ValueError, "query must be .tokens, H, D.", {0: torch.zeros(3, 4)}),
    _bad(ValueError, "query_offsets must not decrease", {3: torch.tensor([0, 9, 8])}),
    _bad(ValueError, "key_offsets must not decrease", {4: torch.tensor([0, 7, 6])}),
    _bad(ValueError, r"key_offsets must be in \[0, 6\]", {4: torch.tensor([0, 4, 7])}),
    _bad(ValueError, "key_offsets must be .3,.", {4: torch.tensor([0, 6])}),
    _bad(TypeError, "key_offsets must be an int32 or int64", {4: torch.tensor([0.0, 4, 6])}),
    _bad(ValueError, "max_query_length must be at least 5", {5: 4}),
    _bad(TypeError, "mask must be a Causal", {}, mask=torch.ones(8, 6).bool()),
]

CASES = [OpCases("attention_varlen", plain_attention_varlen, SAMPLES, WORKLOADS, BAD)]
