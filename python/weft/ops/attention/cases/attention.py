"""Cases of attention."""

import torch

from weft import masks
from weft.ops.attention.biases import RelativeBias
from weft.ops.attention.cases.inputs import (
    discs,
    plain_attention,
    scattered,
    split_heads,
    tokens,
    torch_attention,
    with_more,
)
from weft.ops.cases import BadInput, OpCases, Sample, Workload, randn


def _pattern(*shape: int) -> torch.Tensor:
    """A bool tensor without regularity, with a fully masked row."""
    pattern = randn(*shape, seed=20) > 0.3
    pattern[..., 1, :] = False
    return pattern


def _sliced(dtype, device):
    query, key, value = tokens(2, 4, 24, 40, 10, 8)(dtype, device)
    return query[:, ::2, ::2, ::2], key[:, 1::2, 1:, ::2], value[:, 1::2, 1:, 1::2]


def _broadcast(dtype, device):
    query, key, value = tokens(2, 2, 5, 6, 4)(dtype, device)
    return query, key[:1].expand(2, -1, -1, -1), value[:, :1].expand(-1, 2, -1, -1)


def _all_shapes_of_bias(shape):
    return with_more(tokens(2, 2, 9, 11, 4), shape)


EVERYTHING = ("bias", "sink", "key_weight", "query_weight")
REGIONS = torch.tensor([[0, 0, 1, 1, 2], [3, 3, 3, 1, 1]])
SAMPLES = [
    Sample("plain", tokens(2, 3, 5, 7, 4)),
    Sample("prime", tokens(1, 2, 67, 131, 19, 13)),
    Sample("joint_projection", split_heads(2, 3, 49, 16)),
    Sample("sliced", _sliced),
    Sample("broadcast", _broadcast),
    Sample("one", tokens(1, 1, 1, 1, 1), {"scale": -0.5}),
    Sample("no_keys", tokens(2, 2, 3, 0, 4), {"scale": 0.5}),
    Sample("no_queries", tokens(2, 2, 0, 3, 4), {"scale": 0.5}),
    Sample(
        "one_head",
        lambda dtype, device: tuple(t[:, 0] for t in tokens(3, 1, 13, 17, 5)(dtype, device)),
        {"scale": 0.5},
    ),
    Sample(
        "everything",
        with_more(
            tokens(2, 4, 9, 11, 4, 3, Hkv=2),
            (1, 4, 9, 11),
            (4,),
            (2, 1, 11),
            (2, 4, 9),
            positive=(2, 3),
        ),
        {
            "enable_gqa": True,
            "mask": masks.Causal(1) & masks.Lengths(key=torch.tensor([11, 5])),
            "softcap": 3.0,
            "return_lse": True,
            "return_key_sums": True,
        },
        keywords=EVERYTHING,
    ),
    Sample(
        "dense_mask",
        tokens(2, 2, 19, 70, 8),
        {"mask": _pattern(2, 1, 19, 70), "return_lse": True},
    ),
    Sample("padding", tokens(2, 2, 20, 20, 8), {"mask": masks.Lengths(key=torch.tensor([0, 13]))}),
    Sample("window", tokens(1, 2, 90, 90, 8), {"mask": masks.Window(7, 3)}),
    Sample("neighborhood", tokens(1, 2, 63, 63, 4), {"mask": masks.Neighborhood((7, 9), 3, 2)}),
    Sample(
        "regions_and_table",
        with_more(tokens(4, 2, 5, 5, 4), (1, 2, 5, 5)),
        {"mask": masks.Segments(REGIONS)},
        keywords=("bias",),
    ),
    Sample("bias_of_keys", _all_shapes_of_bias((2, 1, 1, 11)), keywords=("bias",)),
    Sample("bias_of_queries", _all_shapes_of_bias((1, 2, 9, 1)), keywords=("bias",)),
    Sample("bias_of_all", _all_shapes_of_bias((9, 11)), keywords=("bias",)),
]


def _work(B, H, Nq, Nk, D, pairs: float = 1.0) -> dict:
    """Products of the forward and of the backward over the pairs that are visible."""
    product = 2.0 * B * H * Nq * Nk * D * pairs
    return {
        "flops": 2 * product,
        "backward_flops": 5 * product,
        "bytes": lambda item: B * H * (2 * Nq + 2 * Nk) * D * item,
    }


def _with_class_token(make, B: int, N: int):
    """Also the query weights (B, 1, N) that pick the first token."""

    def more(dtype, device):
        first = torch.eye(N, device=device, dtype=dtype)[:1]
        return *make(dtype, device), first.repeat(B, 1, 1)

    return more


WORKLOADS = [
    Workload(
        "vit 8x12x197x64", split_heads(8, 12, 197, 64), **_work(8, 12, 197, 197, 64), quick=True
    ),
    Workload(
        "vit, key padding",
        split_heads(8, 12, 197, 64),
        options={"mask": masks.Lengths(key=torch.tensor([197, 180, 150, 140, 120, 100, 80, 60]))},
        **_work(8, 12, 197, 197, 64, 0.65),
    ),
    Workload("dinov2 1x12x1370x64", split_heads(1, 12, 1370, 64), **_work(1, 12, 1370, 1370, 64)),
    Workload(
        "vit, class token scores",
        _with_class_token(split_heads(8, 12, 197, 64), 8, 197),
        options={"return_key_sums": True},
        keywords=("query_weight",),
        **_work(8, 12, 197, 197, 64),
    ),
    Workload(
        "vit, key sums",
        split_heads(8, 12, 197, 64),
        options={"return_key_sums": True},
        **_work(8, 12, 197, 197, 64, 1.5),
    ),
    Workload("crossvit 32x6x1 of 197", tokens(32, 6, 1, 197, 64), **_work(32, 6, 1, 197, 64)),
    Workload("cvt 4x1x3136 of 784", tokens(4, 1, 3136, 784, 64), **_work(4, 1, 3136, 784, 64)),
    Workload(
        "mask2former 100 of 16384, discs",
        tokens(1, 8, 100, 16384, 32),
        options={"mask": discs(100, 128, 0.1)},
        **_work(1, 8, 100, 16384, 32, 0.1),
    ),
    Workload(
        "mask2former 100 of 16384, random",
        tokens(1, 8, 100, 16384, 32),
        options={"mask": scattered(100, 16384, 0.1)},
        **_work(1, 8, 100, 16384, 32, 0.1),
    ),
    Workload(
        "window 1024 of 4096",
        tokens(1, 8, 4096, 4096, 128),
        options={"mask": masks.Window(1023, 0)},
        **_work(1, 8, 4096, 4096, 128, 0.22),
    ),
    Workload(
        "neighborhood 7 of 56x56",
        tokens(1, 4, 3136, 3136, 32),
        options={"mask": masks.Neighborhood((56, 56), 7)},
        **_work(1, 4, 3136, 3136, 32, 49 / 3136),
    ),
    Workload(
        "neighborhood 7 of 56x56, dilation 2",
        tokens(1, 4, 3136, 3136, 32),
        options={"mask": masks.Neighborhood((56, 56), 7, 2)},
        **_work(1, 4, 3136, 3136, 32, 49 / 3136),
    ),
]


GOOD = tokens(2, 2, 3, 5, 4)


def _bad(error, match, make=GOOD, **options) -> BadInput:
    return BadInput(lambda: make(torch.float32, "cpu"), error, match, options)


def _changed(n: int, change) -> list:
    def make(dtype, device):
        args = list(GOOD(dtype, device))
        args[n] = change(args[n])
        return tuple(args)

    return make


BAD = [
    _bad(ValueError, "key must have the batch", _changed(1, lambda t: t[..., :3])),
    _bad(ValueError, "value must be", _changed(2, lambda t: t[:, :, :4])),
    _bad(ValueError, "key must be .B, H, N, D.", _changed(1, lambda t: t[0])),
    _bad(ValueError, "enable_gqa", tokens(2, 4, 3, 5, 4, Hkv=2)),
    _bad(ValueError, "multiple of the 2 heads", tokens(2, 3, 3, 5, 4, Hkv=2), enable_gqa=True),
    _bad(TypeError, "value must have the dtype", _changed(2, lambda t: t.double())),
    _bad(TypeError, "query must be float64", _changed(0, lambda t: t.int())),
    _bad(ValueError, "mask must broadcast", mask=torch.ones(4, 5, dtype=torch.bool)),
    _bad(TypeError, "what is added to scores is a bias", mask=torch.zeros(3, 5)),
    _bad(TypeError, "mask must be a bool tensor", mask="causal"),
    _bad(ValueError, "bias must broadcast", bias=torch.zeros(3, 4)),
    _bad(TypeError, "bias must be a tensor of", bias=torch.zeros(3, 5).double()),
    _bad(TypeError, "bias must be a tensor, a RelativeBias", bias=1.0),
    _bad(
        ValueError,
        r"index must be in \[0, 2\)",
        bias=RelativeBias(torch.zeros(2, 2), torch.full((3, 5), 2)),
    ),
    _bad(ValueError, "sink must be", sink=torch.zeros(3)),
    _bad(ValueError, "key_weight must be", key_weight=torch.ones(2, 5)),
    _bad(ValueError, "key_weight must be >= 0", key_weight=-torch.ones(2, 1, 5)),
    _bad(ValueError, "query_weight goes with", query_weight=torch.ones(2, 1, 3)),
    _bad(
        ValueError, "query_weight must be", query_weight=torch.ones(2, 1, 5), return_key_sums=True
    ),
    _bad(ValueError, "dropout_p must be in", dropout_p=1.0),
    _bad(ValueError, "softcap must be >= 0", softcap=-1.0),
    _bad(ValueError, "scale must be finite", scale=float("nan")),
    _bad(TypeError, "seed must be an int64 tensor", dropout_p=0.5, seed=3),
    _bad(ValueError, "key lengths must be", mask=masks.Lengths(key=torch.tensor([1, 2, 3]))),
    _bad(ValueError, "query_ids must be", mask=masks.Segments(torch.zeros(4, dtype=torch.int64))),
    _bad(ValueError, "a neighborhood of", mask=masks.Neighborhood((3,), 1)),
    _bad(ValueError, "must have .1, 1. blocks", mask=masks.Blocks(torch.ones(2, 1).bool(), 8)),
]

CASES = [OpCases("attention", plain_attention, SAMPLES, WORKLOADS, BAD, torch_op=torch_attention)]
