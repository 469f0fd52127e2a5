"""Masks packed into bits, once for all heads and layers that share them."""

import torch
from torch import Tensor

from weft.masks import Composition, Dense, Mask, MaskPlan
from weft.ops.registration import FLOATS, Op, cpu, reference, register_no_gradient, triton
from weft.reference.attention import masks as formula
from weft.reference.attention.masks import MaskProgram


def _shapes(args: tuple) -> tuple[MaskProgram, tuple[int, int, int, int]]:
    return MaskProgram(*args[1:4]), args[4:]


def _fake(like, *args):
    mask, (*planes, Nq, Nk) = _shapes((like, *args))
    B, H = formula.plan_planes(mask, *planes)
    rows = 1 if formula.one_row(mask) else Nq
    columns = (Nk + formula.WORD - 1) // formula.WORD
    words = like.new_empty((B, H, rows, columns), dtype=torch.int64)
    tiles = (rows + formula.WORD - 1) // formula.WORD
    return words, like.new_empty((B, H, tiles, columns), dtype=torch.uint8)


def _reference(*args):
    mask, sizes = _shapes(args)
    words, states = formula.mask_plan(mask, *sizes, args[0].device)
    return words.contiguous(), states.contiguous()


mask_plan = Op(
    "attention_mask_plan",
    "(Tensor like, str mask_program, SymInt[] mask_ints, Tensor[] mask_tensors, "
    "SymInt B, SymInt H, SymInt Nq, SymInt Nk) -> (Tensor, Tensor)",
    family="attention",
    fake=_fake,
    implementations=[
        cpu("attention_mask_plan", dtypes=FLOATS | {torch.bool, torch.int64}),
        triton("attention.mask_plan", "mask_plan", dtypes=FLOATS | {torch.bool, torch.int64}),
        reference(_reference),
    ],
)
register_no_gradient(mask_plan, "a mask is not differentiable")


def plan_of(
    program: MaskProgram, B: int, H: int, Nq: int, Nk: int, device: torch.device
) -> MaskPlan:
    like = program.tensors[0] if program.tensors else torch.empty(0, device=device)
    words, states = mask_plan(like.detach(), *program, B, H, Nq, Nk)
    return MaskPlan(words, states, (B, H, Nq, Nk))


def kernel_program(
    mask: Mask | None, shape: tuple[int, int, int, int], query: Tensor, packed: bool
) -> MaskProgram:
    """The mask as the kernels take it: checked, and if ``packed`` with its matrices as bits."""
    if mask is None:
        return MaskProgram()
    mask.check(*shape, query.device)
    return (_packed(mask, shape, query.device) if packed else mask).program()


def _packed(mask: Mask, shape: tuple, device: torch.device) -> Mask:
    if isinstance(mask, Dense):
        return plan_of(mask.program(), *shape, device)
    if isinstance(mask, Composition):
        return Composition(
            mask.operator, tuple(_packed(part, shape, device) for part in mask.parts)
        )
    return mask
