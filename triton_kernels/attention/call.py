"""A call of attention as the launchers see it: what the kernels get, and tiles by its shape."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from weft.triton_kernels.attention.lowering import rules_of
from weft.triton_kernels.attention.rules import Rules
from weft.triton_kernels.attention.scores import Arguments
from weft.triton_kernels.common import Config, configure, float32_precision

COUNT = 14  # arguments that forward and backward share


def padded(size: int) -> int:
    """The power of two that a head is padded to: matrix instructions take 16 at least."""
    return max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Call:
    """The arguments in both forms; ``args`` and ``rules`` are what kernels take."""

    query: Tensor
    key: Tensor
    value: Tensor
    args: Arguments
    rules: Rules

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return (*self.query.shape[:3], self.key.shape[2])

    @property
    def head(self) -> dict:
        """Sizes of heads as the kernels' constants."""
        D, Dv = self.query.shape[3], self.value.shape[3]
        return {"D": D, "BLOCK_D": padded(D), "Dv": Dv, "BLOCK_V": padded(Dv)}

    @property
    def kind(self) -> str:
        """What takes registers beside the products: "labels" (numbers of 64 bits), "rich" (other
        rules and options) or "plain": bands and lengths at most."""
        x, rules = self.args, self.rules
        if rules.query_ids is not None or rules.words is not None:
            return "labels"
        others = (x.bias, x.key_weight, x.seed, x.softcap, rules.shift, rules.sizes)
        return "plain" if all(other is None for other in others) else "rich"

    @property
    def precision(self) -> str:
        return float32_precision()

    def matrix_product(self, config: Config) -> bool:
        """Whether tiles are large enough for the matrix instructions of every architecture."""
        if self.query.dtype != torch.float32:
            return True
        return self.precision == "tf32" and config.tiles["BLOCK_M"] >= 64

    def config(self, table: dict, *kind: str | bool) -> Config:
        """By precision, kind and size of the heads."""
        head = max(64, padded(self.query.shape[3]), padded(self.value.shape[3]))
        number = "float" if self.query.dtype == torch.float32 else "half"
        return configure(table, self.query.device, number, *kind, head)


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    seed: Tensor | None,
    program: str,
    ints: list[int],
    tensors: list[Tensor],
    scale: float,
    softcap: float,
    dropout_p: float,
) -> Call:
    B, H, Nq, _ = query.shape
    Nk = key.shape[2]
    args = Arguments(
        query=query,
        query_strides=query.stride(),
        key=key,
        key_strides=key.stride(),
        value=value,
        value_strides=value.stride(),
        bias=bias,
        bias_strides=None if bias is None else broadcast_strides(bias),
        bias_floor=None if bias is None else torch.finfo(bias.dtype).min / 2,
        sink=None if sink is None else sink.contiguous(),
        key_weight=key_weight,
        key_weight_strides=None if key_weight is None else broadcast_strides(key_weight),
        query_weight=query_weight,
        query_weight_strides=None if query_weight is None else broadcast_strides(query_weight),
        seed=seed if dropout_p else None,
        threshold=int(dropout_p * 2**32),
        grow=1 / (1 - dropout_p),
        scale=scale,
        softcap=softcap or None,
        batches=B,
        heads=H,
        group=H // max(key.shape[1], 1),
        Nq=Nq,
        Nk=Nk,
    )
    return Call(query, key, value, args, rules_of(program, ints, tensors, query, (B, H, Nq, Nk)))


def broadcast_strides(t: Tensor) -> tuple[int, ...]:
    """0 along dimensions of size 1."""
    return tuple(0 if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True))
