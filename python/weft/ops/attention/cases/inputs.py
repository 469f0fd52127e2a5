"""Makers of inputs, and the formula as a PyTorch user writes it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from weft.masks import Mask
from weft.ops.attention.biases import Bias
from weft.ops.cases import randn


def tokens(B: int, H: int, Nq: int, Nk: int, D: int, Dv: int | None = None, Hkv: int | None = None):
    """Makes query, key and value, (B, H, N, D)."""

    def make(dtype, device):
        shapes = ((H, Nq, D), (Hkv or H, Nk, D), (Hkv or H, Nk, Dv or D))
        return tuple(randn(B, *s, dtype=dtype, device=device, seed=n) for n, s in enumerate(shapes))

    return make


def split_heads(B: int, H: int, N: int, D: int):
    """Query, key and value as the views that a joint projection (B, N, 3, H, D) gives."""

    def make(dtype, device):
        joint = randn(B, N, 3, H, D, dtype=dtype, device=device)
        return tuple(joint.permute(2, 0, 3, 1, 4))

    return make


def with_more(make: Callable, *shapes: tuple[int, ...], positive: tuple[int, ...] = ()) -> Callable:
    """More inputs after those of ``make``; ``positive`` are the positions of shapes that are
    weights."""

    def more(dtype, device):
        extra = [
            randn(*shape, dtype=dtype, device=device, seed=10 + n) for n, shape in enumerate(shapes)
        ]
        extra = [x.abs() if n in positive else x for n, x in enumerate(extra)]
        return (*make(dtype, device), *extra)

    return more


def plain_attention(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
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
    """Two products around a softmax over all pairs."""
    assert not dropout_p, "dropout has no deterministic plain form"
    one_head = query.dim() == 3
    if one_head:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    shape = (*query.shape[:3], key.shape[2])
    s = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + (bias.to_dense() if isinstance(bias, Bias) else bias)
    if mask is not None:
        allowed = mask.to_dense(shape, s.device) if isinstance(mask, Mask) else mask
        s = s.masked_fill(~allowed, -torch.inf)
    if key_weight is not None:
        s = s + key_weight.log()[:, :, None]
    dead = (s == -torch.inf).all(-1)
    s = s.masked_fill(dead[..., None], 0)  # of −∞ alone the gradients are NaN
    lse = s.logsumexp(-1).float() if s.dtype != torch.float64 else s.logsumexp(-1)
    if sink is None:
        p = s.softmax(-1)
    else:
        column = sink[:, None, None].expand(*shape[:3], 1).to(s.dtype)
        p = torch.cat([s, column], -1).softmax(-1)[..., :-1]
    p = p.masked_fill(dead[..., None], 0)
    results = [p.to(value.dtype) @ value]
    if return_lse:
        results.append(lse.masked_fill(dead, -torch.inf))
    if return_key_sums:
        w = 1 if query_weight is None else query_weight[..., None]
        results.append((p * w).sum(2, dtype=lse.dtype))
    results = [r.squeeze(1) for r in results] if one_head else results
    return results[0] if len(results) == 1 else tuple(results)


def torch_attention(query, key, value, *, mask=None, bias=None, return_lse=False, **options):
    """F.scaled_dot_product_attention, with the log-sum-exp beside it."""
    scale, enable_gqa = options.pop("scale", None), options.pop("enable_gqa", False)
    if options:
        raise NotImplementedError(f"it has no {', '.join(options)}")
    shape = (*query.shape[:-1], key.shape[-2])
    attn_mask = bias.to_dense() if isinstance(bias, Bias) else bias
    if mask is not None:
        allowed = mask.to_dense(shape, query.device) if isinstance(mask, Mask) else mask
        zero = query.new_zeros(()) if attn_mask is None else attn_mask
        attn_mask = torch.where(allowed, zero, -torch.inf)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa
    )
    if not return_lse:
        return out
    _, lse = plain_attention(query, key, value, mask=mask, bias=bias, scale=scale, return_lse=True)
    return out, lse


def discs(queries: int, side: int, share: float) -> Tensor:
    """(queries, side²) bool: a disc of this share of a map for each query, at fixed places."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.rand(queries, 2, generator=generator) * side
    axis = torch.arange(side)
    grid = torch.cartesian_prod(axis, axis)
    radius = side * math.sqrt(share / math.pi)
    return (grid - centers[:, None]).square().sum(-1) <= radius**2


def scattered(queries: int, keys: int, share: float) -> Tensor:
    """(queries, keys) bool, True at random places."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(queries, keys, generator=generator) < share
