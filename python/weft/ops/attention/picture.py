"""A small drawing of a mask in text, for ``print(mask)``."""

import torch

from weft.masks import Blocks, Composition, Dense, Mask, MaskPlan, Neighborhood, Segments

SIZE = 16  # rows of a drawing, and the queries and keys of a rule that has no size of its own


def picture(mask: Mask) -> str:
    """Queries downwards, keys to the right, of the first batch and head: ``█`` visible, ``·`` not,
    ``▒`` some of the pairs that share a character."""
    Nq, Nk = _size(mask) or (SIZE, SIZE)
    allowed = _first_plane(mask, Nq, Nk).float()
    rows, columns = min(SIZE, Nq), min(2 * SIZE, Nk)
    if not rows or not columns:
        return f"{type(mask).__name__}, {Nq} queries, {Nk} keys"
    share = torch.nn.functional.adaptive_avg_pool2d(allowed[None], (rows, columns))[0]
    glyph = lambda x: "·" if x == 0 else "█" if x == 1 else "▒"  # noqa: E731
    lines = ["".join(glyph(x) for x in row) for row in share.tolist()]
    return "\n".join([f"{type(mask).__name__}, {Nq} queries × {Nk} keys", *lines])


def _first_plane(mask: Mask, Nq: int, Nk: int) -> torch.Tensor:
    from weft.reference.attention.masks import MaskProgram, allowed_pairs

    program = mask.program()
    tensors = [t[:1].cpu() for t in program.tensors]
    allowed = allowed_pairs(
        MaskProgram(program.program, program.ints, tensors), 1, 1, Nq, Nk, torch.device("cpu")
    )
    return allowed[0, 0]


def _size(mask: Mask) -> tuple[int, int] | None:
    """The queries and keys that a mask is made for, if it says so."""
    if isinstance(mask, Composition):
        sizes = [size for part in mask.parts if (size := _size(part)) is not None]
        return tuple(max(n) for n in zip(*sizes, strict=True)) if sizes else None
    if isinstance(mask, MaskPlan):
        return mask.shape[2], mask.shape[3]
    if isinstance(mask, Neighborhood):
        count = torch.Size(mask.shape).numel()
        return count, count
    if isinstance(mask, Dense):
        return tuple(mask.program().tensors[0].shape[2:])
    if isinstance(mask, Segments):
        query_ids, key_ids = mask.program().tensors
        return query_ids.shape[-1], key_ids.shape[-1]
    if isinstance(mask, Blocks):
        blocks = mask.program().tensors[0].shape[2:]
        return tuple(n * size for n, size in zip(blocks, mask.block_size, strict=True))
    return None
