"""PyTorch's own kernels, where they do exactly what is asked: long dense heads, half precision.

Of what they save, out and lse are all that the backward needs without dropout.
"""

import torch
from torch import Tensor

from weft.triton_kernels.attention.call import COUNT

HEADS = (64, 128)
SHORTEST = 1024  # queries and keys: below, launching decides


def sdpa_applies(query: Tensor, key: Tensor, value: Tensor, *rest) -> bool:
    """Whether a call of either op, with its arguments in order, is theirs."""
    bias, sink, key_weight, _, _, program, _, _, _, softcap, dropout_p = rest[: COUNT - 3]
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if program or softcap or dropout_p or any(t is not None for t in (bias, sink, key_weight)):
        return False
    if any(t.shape[3] not in HEADS or t.stride(3) != 1 for t in (query, key, value)):
        return False
    same = query.shape[3] == value.shape[3] and query.shape[1] == key.shape[1]
    asks_more = (
        rest[COUNT - 3]
        if len(rest) == COUNT - 2
        else any(t is not None for t in rest[COUNT - 2 : COUNT])
    )  # key sums, or gradients of lse and key sums
    return same and not asks_more and min(query.shape[2], key.shape[2]) >= SHORTEST


def sdpa_forward(*arguments) -> tuple[Tensor, Tensor]:
    """out (B, Nq, H, Dv) and lse (B, H, Nq)."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *arguments[:3], scale=arguments[11]
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def sdpa_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query (B, Nq, H, D), key and value (B, Nk, H, D)."""
    grad_out, _, _, out, lse, *_ = arguments[COUNT:]
    query, key, value = arguments[:3]
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # state of the dropout
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(grad_out.transpose(1, 2), query, key, value, out.transpose(1, 2), lse),
        *(None, None, query.shape[2], key.shape[2], 0.0, False, unused, unused),
        scale=arguments[11],
    )
    return tuple(grad.transpose(1, 2).contiguous() for grad in grads)
