"""The part of a schema that the ops of attention share, and its checks."""

import torch
from torch import Tensor

from weft.masks import Dense, Mask
from weft.ops.checks import check_float, values_are_checked
from weft.reference.attention.attention import Inputs
from weft.reference.attention.masks import MaskProgram

SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sink, Tensor? key_weight, "
    "Tensor? query_weight, Tensor? seed, str mask_program, SymInt[] mask_ints, "
    "Tensor[] mask_tensors, float scale, float softcap, float dropout_p"
)
COUNT = 14  # arguments of SCHEMA


def inputs_of(args: tuple) -> Inputs:
    """The first arguments of an op as one object."""
    return Inputs(*args[:8], MaskProgram(*args[8:11]), *args[11:14])


def arguments_of(x: Inputs) -> tuple:
    """In the order of ``SCHEMA``."""
    tensors = (x.query, x.key, x.value, x.bias, x.sink, x.key_weight, x.query_weight, x.seed)
    return (*tensors, *x.mask, x.scale, x.softcap, x.dropout_p)


def check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Shapes and dtypes of (B, H, N, D) tensors."""
    check_float(query=query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != query.dim() or t.dim() not in (3, 4):
            raise ValueError(
                f"{name} must be (B, H, N, D), or (B, N, D) with query, key and value alike, "
                f"got {tuple(t.shape)}"
            )
    if key.shape[0] != query.shape[0] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have the batch and the last size of query, {tuple(query.shape)}, "
            f"got {tuple(key.shape)}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must be {(*key.shape[:-1], 'Dv')} beside key, got {tuple(value.shape)}"
        )
    if query.dim() == 4:
        Hq, Hkv = query.shape[1], key.shape[1]
        if Hq != Hkv and not enable_gqa:
            raise ValueError(
                f"key must have the {Hq} heads of query, got {Hkv}; enable_gqa shares key heads"
            )
        if Hq != Hkv and (Hkv == 0 or Hq % Hkv):
            raise ValueError(f"query must have a multiple of the {Hkv} heads of key, got {Hq}")


def wide_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def check_beside(name: str, t: Tensor, query: Tensor) -> None:
    """A float tensor in the dtype of query or of its sums, on its device."""
    kinds = (query.dtype, wide_dtype(query))
    if not isinstance(t, Tensor) or t.dtype not in kinds:
        raise TypeError(
            f"{name} must be a tensor of {kinds[0]} or {kinds[1]}, "
            f"got {getattr(t, 'dtype', type(t).__name__)}"
        )
    if t.device != query.device:
        raise ValueError(f"{name} must be on {query.device} as the query, got {t.device}")


def check_bias(bias: Tensor, query: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A bias that broadcasts to ``shape``, with 4 dimensions, those that are expanded of size 1."""
    check_beside("bias", bias, query)
    full = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if bias.dim() > 4 or any(n != 1 and n != m for n, m in zip(full, shape, strict=True)):
        raise ValueError(f"bias must broadcast to {shape}, got {tuple(bias.shape)}")
    return bias.reshape(full)


def check_sink(sink: Tensor, query: Tensor) -> Tensor:
    check_beside("sink", sink, query)
    if sink.shape != (query.shape[1],):
        raise ValueError(f"sink must be ({query.shape[1]},), got {tuple(sink.shape)}")
    return sink.to(wide_dtype(query))


def check_weight(name: str, weight: Tensor, query: Tensor, n: int) -> Tensor:
    """(B, 1 or H, n), of keys or queries."""
    check_beside(name, weight, query)
    B, H = query.shape[:2]
    if weight.dim() != 3 or weight.shape[0] != B or (weight.shape[1] != 1 and weight.shape[1] != H):
        raise ValueError(f"{name} must be ({B}, 1 or {H}, {n}), got {tuple(weight.shape)}")
    if weight.shape[2] != n:
        raise ValueError(f"{name} must be ({B}, 1 or {H}, {n}), got {tuple(weight.shape)}")
    return weight.to(wide_dtype(query))


def check_not_negative(name: str, weight: Tensor) -> None:
    if values_are_checked(weight) and bool((weight < 0).any()):
        raise ValueError(f"{name} must be >= 0, got {float(weight.min())}")


def check_numbers(scale: float, softcap: float, dropout_p: float) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be >= 0 (0: none) and finite, got {softcap}")
    if scale != scale or abs(scale) == float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")


def check_seed(seed: Tensor | None, dropout_p: float, query: Tensor) -> Tensor | None:
    """The seed of the dropout; one of PyTorch's generator where None is given."""
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(1 << 62, (), dtype=torch.int64, device=query.device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 tensor, got {getattr(seed, 'dtype', type(seed))}")
    if seed.dim() != 0 or seed.device != query.device:
        raise ValueError(
            f"seed must have no dimensions, on {query.device}, got {tuple(seed.shape)} on "
            f"{seed.device}"
        )
    return seed


def mask_of(mask: Tensor | Mask | None) -> Mask | None:
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be a bool tensor or a weft.masks.Mask, got {mask.dtype}; "
                "what is added to scores is a bias"
            )
        return Dense(mask)
    raise TypeError(f"mask must be a bool tensor or a weft.masks.Mask, got {type(mask).__name__}")
