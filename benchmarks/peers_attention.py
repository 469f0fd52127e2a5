"""Peers of the attention family, each with the arguments of our functions."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from weft import masks
from weft.benchmarks.providers import Peer
from weft.ops.attention.biases import Bias


def dense_mask(mask, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as the matrix that most peers want; a user must build it too, so it is timed."""
    if not isinstance(mask, masks.Mask):
        return mask
    return mask.to_dense((*query.shape[:3], key.shape[2]), query.device)


def plain_only(return_lse=False, return_key_sums=False, **options) -> None:
    asked = [v for v in options.values() if isinstance(v, Tensor) or v]
    if return_lse or return_key_sums or asked:
        raise NotImplementedError("it has no key sums, log-sum-exp, sinks, weights or softcap")


def sdpa(backend: SDPBackend | None) -> Callable:
    """torch.nn.functional.scaled_dot_product_attention: the backend that it chooses, or one."""

    def attention(query, key, value, *, mask=None, bias=None, scale=None, enable_gqa=False, **rest):
        plain_only(**rest)
        attn_mask = dense_mask(mask, query, key)
        if bias is not None:
            bias = bias.to_dense() if isinstance(bias, Bias) else bias
            attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, -torch.inf)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa
            )

    return attention


def sdpa_windows() -> Callable:
    """The same with Swin's bias and its mask of shifted windows as one matrix for each window."""
    attention = sdpa(None)

    def window_attention(query, key, value, *, bias, region_ids=None, scale=None):
        mask = None
        if region_ids is not None:
            mask = masks.Segments(region_ids)
        return attention(query, key, value, mask=mask, bias=bias, scale=scale)

    return window_attention


def flex() -> Callable:
    """FlexAttention, compiled; block masks are built in every call, as shapes and masks differ.
    On the CPU it has a forward alone."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query, key, value, *, mask=None, bias=None, scale=None, enable_gqa=False, **rest):
        plain_only(**rest)
        if query.device.type == "cpu":
            query, key, value = (t.detach() for t in (query, key, value))
        block_mask = None
        if mask is not None:
            allowed = dense_mask(mask, query, key)
            allowed = allowed.reshape((1,) * (4 - allowed.dim()) + tuple(allowed.shape))
            B, H = allowed.shape[:2]

            def visible(b, h, i, j):
                return allowed[b if B > 1 else 0, h if H > 1 else 0, i, j]

            sizes = (query.shape[2], key.shape[2])
            block_mask = create_block_mask(visible, B, H, *sizes, device=query.device)
        score_mod = None
        if bias is not None:
            full = bias.expand(*query.shape[:3], key.shape[2])

            def score_mod(score, b, h, i, j):
                return score + full[b, h, i, j]

        return compiled(query, key, value, score_mod, block_mask, scale, enable_gqa)

    return attention


def xformers_attention() -> Callable:
    import xformers.ops as xops

    def attention(query, key, value, *, mask=None, bias=None, scale=None, enable_gqa=False, **rest):
        plain_only(enable_gqa=enable_gqa, **rest)
        if query.device.type == "cpu":
            raise NotImplementedError("xFormers has no CPU kernel")
        if mask is not None:
            allowed = dense_mask(mask, query, key)
            zero = torch.zeros((), dtype=query.dtype, device=query.device)
            bias = (zero if bias is None else bias).masked_fill(~allowed, -torch.inf)
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        rows = (t.transpose(1, 2) for t in (query, key, value))
        return xops.memory_efficient_attention(*rows, bias, scale=scale).transpose(1, 2)

    return attention


def natten_attention() -> Callable:
    import natten

    def attention(query, key, value, *, mask=None, scale=None, bias=None, **rest):
        plain_only(**rest)
        if not isinstance(mask, masks.Neighborhood) or bias is not None:
            raise NotImplementedError("NATTEN computes neighborhoods")
        on_grid = (t.transpose(1, 2).unflatten(1, mask.shape) for t in (query, key, value))
        function = getattr(natten, f"na{len(mask.shape)}d")
        out = function(*on_grid, kernel_size=mask.kernel, dilation=mask.dilation, scale=scale)
        return out.flatten(1, len(mask.shape)).transpose(1, 2)

    return attention


def flash_attention() -> Callable:
    from flash_attn import flash_attn_func

    def attention(query, key, value, *, mask=None, scale=None, bias=None, **rest):
        plain_only(**{k: v for k, v in rest.items() if k not in ("softcap", "enable_gqa")})
        causal = isinstance(mask, masks.Causal) and mask.offset == key.shape[2] - query.shape[2]
        if bias is not None or (mask is not None and not causal and not _window(mask)):
            raise NotImplementedError("FlashAttention has causal and window masks, and no bias")
        window = (mask.left, mask.right) if _window(mask) else (-1, -1)
        rows = (t.transpose(1, 2) for t in (query, key, value))
        softcap = rest.get("softcap", 0.0)
        out = flash_attn_func(
            *rows, softmax_scale=scale, causal=causal, window_size=window, softcap=softcap
        )
        return out.transpose(1, 2)

    return attention


def _window(mask) -> bool:
    return isinstance(mask, masks.Window) and mask.offset == 0


PEERS = [
    Peer("sdpa", "attention", "torch", "torch", lambda: sdpa(None)),
    Peer("sdpa flash", "attention", "torch", "torch", lambda: sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer(
        "sdpa efficient",
        "attention",
        "torch",
        "torch",
        lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
    ),
    Peer("sdpa cudnn", "attention", "torch", "torch", lambda: sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("flex", "attention", "torch", "torch", flex, compiles=True),
    Peer("xformers", "attention", "xformers", "xformers", xformers_attention),
    Peer("natten", "attention", "natten", "natten", natten_attention),
    Peer("flash-attn", "attention", "flash_attn", "flash-attn", flash_attention),
    Peer("sdpa", "window_attention", "torch", "torch", sdpa_windows),
]
