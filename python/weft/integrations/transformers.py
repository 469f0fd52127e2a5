"""The attention function and the mask function that transformers calls ``"weft"``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from inspect import getclosurevars
from operator import and_

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

from weft.integrations.common import attend
from weft.masks import Causal, Dense, Lengths, Mask, Segments, Window


def register() -> None:
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"weft needs transformers 5 or newer, found {transformers.__version__}")
    transformers.AttentionInterface.register("weft", attention_forward)
    transformers.AttentionMaskInterface.register("weft", attention_mask)


@dataclass(frozen=True)
class SizedMask:
    """A mask on its way through a model, from the mask interface to the attention interface."""

    mask: Mask
    shape: tuple[int, int, int, int]
    device: torch.device | str

    def contiguous(self) -> Tensor:
        """The bool matrix: ``generate`` asks for it when it makes masks before a static cache has
        its tensors, and gives it to the model in place of the padding."""
        return self.mask.to_dense(self.shape, self.device).contiguous()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SizedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """What transformers calls an attention interface, on :func:`weft.attention`.

    query ``(B, H, Nq, D)``; key, value ``(B, Hkv, Nk, D)``; result ``(B, Nq, H, D)``, no weights.
    Without a mask it is causal where the module says so and there is more than one query, as
    ``sdpa`` is; ``s_aux`` is a sink.
    """
    if isinstance(attention_mask, SizedMask):
        attention_mask = attention_mask.mask
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = attend(
        query,
        key,
        value,
        attention_mask,
        is_causal=is_causal and attention_mask is None and query.shape[2] > 1,
        dropout_p=dropout,
        scale=scaling,
        bias=position_bias,
        softcap=softcap or 0.0,
        sink=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> SizedMask | Tensor | None:
    """What transformers calls a mask interface: rules where it made ``mask_function`` itself.

    Queries and keys count from their offsets. ``attention_mask`` ``(B, number of keys)`` is False
    for padding; where that is not at the end, the mask is packed into bits, once for all layers.
    It is a bool matrix, as for ``sdpa``, for other functions, for a static cache (whose offset is a
    tensor) and for a model that allows no mask to be left out: it means to work on it.
    """
    rules = None
    if not use_vmap and not isinstance(q_offset, Tensor):
        rules = _rules(mask_function, q_offset - kv_offset)
    packed = rules is not None and any(isinstance(rule, Segments) for rule in rules)
    if rules is None or not (allow_is_causal_skip or allow_is_bidirectional_skip or packed):
        return masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        rules.append(_padding(padding[:, kv_offset : kv_offset + kv_length]))
    mask = _joined(rules, q_length, kv_length)
    if mask is None:
        return None
    shape = (batch_size, 1, q_length, kv_length)
    if any(isinstance(rule, Dense) for rule in rules):
        mask = mask.plan(shape, device)
    return SizedMask(mask, shape, device)


def _rules(function: Callable, offset: int) -> list[Mask | None] | None:
    """Rules that hold together where ``function`` is True, or None if it is not made of known ones.

    The functions of ``transformers.masking_utils`` are told by name, the numbers and tensors that
    they hold are read from their closures. ``offset``: of the queries, less that of the keys.
    """
    if function is masking_utils.causal_mask_function:
        return [Window(None, 0, offset)]
    if function is masking_utils.bidirectional_mask_function:
        return []
    if function.__module__ != masking_utils.__name__ or torch.compiler.is_compiling():
        return None  # the compiler does not open closures
    held = getclosurevars(function).nonlocals
    maker = function.__qualname__.partition(".")[0]
    if maker == "and_masks":
        of_parts = [_rules(part, offset) for part in held["mask_functions"]]
        known = all(rules is not None for rules in of_parts)
        return [rule for rules in of_parts for rule in rules] if known else None
    if maker == "sliding_window_overlay":
        return [Window(held["sliding_window"] - 1, None, offset)]
    if maker == "sliding_window_bidirectional_overlay":
        return [Window(held["sliding_window"], held["sliding_window"], offset)]
    if maker == "packed_sequence_mask_function":
        return [Segments(held["packed_sequence_mask"])]
    if maker == "remap_positions_for_packed_sequence":
        # Positions count by one inside a sequence, and the rules look at differences alone.
        return _rules(held["mask_function"], offset)
    return None


def _padding(real: Tensor) -> Mask | None:
    """The rule of keys (B, Nk) that are real: lengths if the padding comes last."""
    if not torch.compiler.is_compiling():
        if real.all():
            return None
        if (real[:, :-1] >= real[:, 1:]).all():
            return Lengths(key=real.sum(1))
    return Dense(real[:, None, None])


def _joined(rules: list[Mask | None], q_length: int, kv_length: int) -> Mask | None:
    """One mask of all rules, in which one window stands for all windows."""
    windows = [rule for rule in rules if isinstance(rule, Window)]
    others = [rule for rule in rules if rule is not None and not isinstance(rule, Window)]
    if windows:
        left = _least([window.left for window in windows])
        right = _least([window.right for window in windows])
        offset = windows[0].offset
        if left is None or left >= offset + q_length - 1:
            left = None  # the last query looks back to the first key
        if right is not None and right + offset >= kv_length - 1 and (right > 0 or q_length == 1):
            right = None  # the first query looks forward to the last key
        if left is None and right == 0:
            others.insert(0, Causal(offset))
        elif left is not None or right is not None:
            others.insert(0, Window(left, right, offset))
    return reduce(and_, others) if others else None


def _least(ends: list[int | None]) -> int | None:
    known = [end for end in ends if end is not None]
    return min(known) if known else None
