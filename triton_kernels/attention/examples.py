"""Calls of attention on meta tensors, that a test compiles: every kind of mask and of option."""

from collections.abc import Iterator

import torch
from torch import Tensor

from weft.triton_kernels.attention import attention as ops
from weft.triton_kernels.attention import gradients

FAR = 1 << 40


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def ids(*shape: int) -> Tensor:
    return make(*shape, dtype=torch.int64)


def call(
    dtype: torch.dtype,
    shape: tuple[int, ...] = (8, 16, 1024, 1024, 64, 64),
    mask: tuple = ("", [], []),
    group: int = 1,
    bias: Tensor | None = None,
    **options,
) -> tuple:
    """The arguments of an op; shape is (B, H, Nq, Nk, D, Dv)."""
    B, H, Nq, Nk, D, Dv = shape
    tokens = (make(B, H, Nq, D, dtype=dtype), make(B, H // group, Nk, D, dtype=dtype))
    tokens += (make(B, H // group, Nk, Dv, dtype=dtype),)
    names = ("sink", "key_weight", "query_weight", "seed")
    tensors = (options.get(name) for name in names)
    numbers = (0.125, options.get("softcap", 0.0), options.get("dropout_p", 0.0))
    return (*tokens, bias, *tensors, *mask, *numbers)


def plain(dtype: torch.dtype) -> Iterator[tuple]:
    for size in (64, 128, 256):
        yield call(dtype, (8, 16, 1024, 1024, size, size))
    yield call(dtype, (8, 12, 197, 197, 64, 64))
    yield call(dtype, (2, 8, 100, 16384, 32, 32))
    yield call(dtype, (2, 8, 777, 555, 72, 40), group=4)


def masked(dtype: torch.dtype) -> Iterator[tuple]:
    yield call(dtype, (2, 32, 4096, 4096, 128, 128), ("band", [-FAR, 0], []), 4)
    yield call(dtype, mask=("band", [-512, 512], []))
    lengths = ("query_lengths key_lengths &", [], [ids(8), ids(8)])
    yield call(dtype, mask=lengths)
    documents = [ids(1, 1, 4096), ids(1, 1, 4096), ids(1, 4096)]
    program = ("segments band_rows &", [-FAR, 0], documents)
    yield call(dtype, (1, 16, 4096, 4096, 64, 64), program)
    grid = ("neighborhood", [2, 32, 32, 7, 7, 2, 1], [])
    yield call(dtype, mask=grid)
    bits = [ids(2, 1, 100, 256), make(2, 1, 2, 256, dtype=torch.uint8)]
    yield call(dtype, (2, 8, 100, 16384, 32, 32), ("bits", [], bits))
    yield call(dtype, (2, 8, 100, 16384, 256, 256), ("bits", [], bits))


def with_options(dtype: torch.dtype) -> Iterator[tuple]:
    windows = ("segments", [], [ids(64, 1, 49), ids(64, 1, 49)])
    bias = make(1, 6, 49, 49)
    yield call(dtype, (1024, 6, 49, 49, 32, 32), windows, bias=bias)
    yield call(dtype, (1024, 6, 144, 144, 32, 32), bias=make(1, 6, 144, 144, dtype=dtype))
    yield call(dtype, bias=make(8, 1, 1, 1024))
    sums = {"key_weight": make(8, 1, 1024), "query_weight": make(8, 16, 1024)}
    yield call(dtype, **sums, sink=make(16))
    seed = torch.empty((), device="meta", dtype=torch.int64)
    for size in (64, 128, 256):
        shape = (8, 16, 1024, 1024, size, size)
        options = {"softcap": 30.0, "dropout_p": 0.1, "seed": seed, "sink": make(16)}
        yield call(dtype, shape, bias=make(1, 16, 1024, 1024), **options)


def calls(dtype: torch.dtype) -> Iterator[tuple]:
    yield from plain(dtype)
    yield from masked(dtype)
    yield from with_options(dtype)


def forward(dtype: torch.dtype) -> None:
    for arguments in calls(dtype):
        ops.attention(*arguments, False)


def key_sums(dtype: torch.dtype) -> None:
    for arguments in calls(dtype):
        ops.attention(*arguments, True)


def _backward(arguments: tuple, sums: bool, wanted: int) -> None:
    query, key, value = arguments[:3]
    (B, H, Nq, _), Nk, dtype = query.shape, key.shape[2], query.dtype
    out = make(B, Nq, H, value.shape[3], dtype=dtype)
    given = sum(1 << n for n, t in enumerate(arguments[:7]) if t is not None)
    of_sums = make(B, H, Nk) if sums else None
    upstream = (out, None, of_sums, out, make(B, H, Nq), make(B, H, 2, Nq))
    gradients.attention_backward(*arguments, *upstream, given & wanted)


def backward(dtype: torch.dtype) -> None:
    for arguments in calls(dtype):
        if max(arguments[0].shape[3], arguments[2].shape[3]) <= gradients.LARGEST_HEAD:
            for sums in (True, False):
                _backward(arguments, sums, ~gradients.BIAS)


def grad_bias(dtype: torch.dtype) -> None:
    for arguments in with_options(dtype):
        if arguments[3] is not None and arguments[0].shape[3] <= gradients.LARGEST_HEAD:
            _backward(arguments, False, gradients.BIAS)
