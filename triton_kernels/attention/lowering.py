"""A mask program as the kernels take it: `Rules`, all of which hold.

A conjunction of different rules is taken as it is, with bands joined to one. Whatever else a
program says is first packed into bits.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.triton_kernels.attention.rules import UNBOUNDED, Rules
from weft.triton_kernels.attention.rules import WORD as CONSTANT

WORD: int = CONSTANT.value

RANGES_FROM = 512  # tokens; of fewer it does not pay to look which tiles a label can skip


def rules_of(
    program: str, ints: list[int], tensors: list[Tensor], like: Tensor, sizes: tuple
) -> Rules:
    """Of scores of ``sizes`` (B, H, Nq, Nk), on the device of ``like``."""
    if not program:
        return Rules()
    fields = _conjunction(program, ints, tensors, sizes)
    if fields is None:
        packed = torch.ops.weft.attention_mask_plan(like, program, ints, tensors, *sizes)
        fields = _conjunction("bits", [], list(packed), sizes)
    return Rules(**fields)


def arguments_of_rules(
    program: str, ints: list[int], tensors: list[Tensor]
) -> Iterator[tuple[str, list[int], list[Tensor]]]:
    """Every rule of a program with its own integers and tensors."""
    given, matrices = iter(ints), iter(tensors)
    for rule in program.split():
        if rule in "&|~":
            continue
        if rule == "neighborhood":
            axes = next(given)
            own = [axes, *(next(given) for _ in range(3 * axes))]
        else:
            own = [next(given) for _ in range(2 if rule in ("band", "band_rows", "blocks") else 0)]
        count = {"band": 0, "neighborhood": 0, "segments": 2, "bits": 2}.get(rule, 1)
        yield rule, own, [next(matrices) for _ in range(count)]


def _conjunction(program: str, ints: list, tensors: list, sizes: tuple) -> dict | None:
    """The fields of Rules, or None where the program is not a conjunction of different rules."""
    if "|" in program or "~" in program:
        return None
    fields: dict = {}
    for rule, numbers, matrices in arguments_of_rules(program, ints, tensors):
        if rule in ("dense", "blocks"):
            return None
        if rule == "band" and "low" in fields and "shift" not in fields:
            # An intersection of bands is a band.
            low, high = (max(-UNBOUNDED, min(end, UNBOUNDED)) for end in numbers)
            fields |= {"low": max(low, fields["low"]), "high": min(high, fields["high"])}
            continue
        new = _fields(rule, numbers, matrices, sizes)
        if new.keys() & fields.keys():
            return None
        fields |= new
    return fields


def _fields(rule: str, numbers: list, matrices: list, sizes: tuple) -> dict:
    *_, Nq, Nk = sizes
    matrices = [t.contiguous() for t in matrices]
    if rule in ("band", "band_rows"):
        low, high = (max(-UNBOUNDED, min(end, UNBOUNDED)) for end in numbers)
        fields = {"low": low, "high": high}
        if rule == "band_rows":
            fields |= {"shift": matrices[0], "shift_batches": matrices[0].shape[0]}
        return fields
    if rule in ("query_lengths", "key_lengths"):
        return {rule: matrices[0], f"{rule}_batches": matrices[0].shape[0]}
    if rule == "segments":
        ranges = max(Nq, Nk) >= RANGES_FROM
        query_ids, key_ids = matrices
        return _labels("query_ids", query_ids, ranges) | _labels("key_ids", key_ids, ranges)
    if rule == "neighborhood":
        n, *numbers = numbers
        axes = [(1,) * (3 - n) + tuple(numbers[k * n : k * n + n]) for k in range(3)]
        return dict(zip(("sizes", "kernel", "dilation"), axes, strict=True))
    if rule == "bits":
        words, states = matrices
        planes = {"words_planes": tuple(words.shape[:2]), "words_rows": words.shape[2]}
        return {"words": words, "states": states} | planes
    raise ValueError(f"mask_program has no rule {rule!r}")


def _labels(name: str, ids: Tensor, ranges: bool) -> dict:
    batches, heads, N = ids.shape
    fields = {name: ids, f"{name}_planes": (batches, heads)}
    if ranges:
        far = torch.iinfo(torch.int64)
        tiles = lambda fill: F.pad(ids, (0, -N % WORD), value=fill).unflatten(2, (-1, WORD))  # noqa: E731
        least, greatest = tiles(far.max).amin(3), tiles(far.min).amax(3)
        fields[f"{name}_range"] = torch.stack([least, greatest])
    return fields
