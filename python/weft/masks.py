"""Masks of attention: which keys a query sees. True, visible, attends: all the same.

Rules (``Causal``, ``Window``, ``Lengths``, ``Segments``, ``Neighborhood``, ``Blocks``) are
evaluated inside the kernels and never become a matrix; ``Dense`` holds one; ``&``, ``|`` and ``~``
join them. ``plan`` packs a mask into bits once, for many calls. ``print(mask)`` draws it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from weft.reference.attention.masks import EMPTY, UNBOUNDED, MaskProgram, allowed_pairs

__all__ = [
    "Blocks",
    "Causal",
    "Dense",
    "Lengths",
    "Mask",
    "MaskPlan",
    "Neighborhood",
    "Segments",
    "Window",
]


class Mask:
    """What all masks can do. A mask is immutable and holds no sizes but those of its tensors."""

    def __init_subclass__(cls):
        names = lambda: [field.name for field in fields(cls)]  # noqa: E731
        register_pytree_node(
            cls,
            lambda mask: ([getattr(mask, name) for name in names()], None),
            lambda values, _: _rebuilt(cls, values),
            serialized_type_name=f"weft.masks.{cls.__name__}",
        )

    def __and__(self, other: "Mask") -> "Mask":
        return _joined("&", self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return _joined("|", self, other)

    def __invert__(self) -> "Mask":
        return Composition("~", (self,))

    def program(self) -> MaskProgram:
        """The mask as the ops take it (``weft.reference.attention.masks``)."""
        raise NotImplementedError

    def check(self, B: int, H: int, Nq: int, Nk: int, device: torch.device) -> None:
        """Raises ValueError where the mask does not belong to scores of this shape."""

    def to_dense(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor of ``shape`` (B, H, Nq, Nk), or (Nq, Nk)."""
        device = _device_of(self, device)
        B, H, Nq, Nk = full = _full_shape(shape)
        self.check(*full, device)
        allowed = allowed_pairs(self.program(), *full, device)
        return allowed.expand(full)[(0,) * (4 - len(shape))]

    def plan(self, shape: Sequence[int], device: torch.device | str | None = None) -> "MaskPlan":
        """The mask of scores of ``shape`` (B, H, Nq, Nk), or (Nq, Nk), packed into bits.

        One pass, one bit for each pair, broadcast dimensions once. A plan is a mask of this shape,
        to be used by every layer and step that shares it.
        """
        from weft.ops.attention.mask_plan import plan_of

        device = _device_of(self, device)
        full = _full_shape(shape)
        self.check(*full, device)
        return plan_of(self.program(), *full, device)

    def __str__(self) -> str:
        from weft.ops.attention.picture import picture

        return picture(self)


def _rebuilt(cls: type, values: list) -> Mask:
    """Without the checks of ``__post_init__``: pytrees hold placeholders at times."""
    mask = object.__new__(cls)
    for field, value in zip(fields(cls), values, strict=True):
        object.__setattr__(mask, field.name, value)
    return mask


def _full_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    if len(shape) not in (2, 4):
        raise ValueError(f"shape must be (B, H, Nq, Nk) or (Nq, Nk), got {tuple(shape)}")
    return tuple(shape) if len(shape) == 4 else (1, 1, *shape)


def _device_of(mask: Mask, device) -> torch.device:
    tensors = mask.program().tensors
    found = tensors[0].device if tensors else torch.device("cpu")
    return found if device is None else torch.device(device)


def _check_ids(name: str, value, kinds: tuple = (torch.int64,)) -> None:
    if not isinstance(value, Tensor) or value.dtype not in kinds:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name} must be a tensor of {wanted}, got {got}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the query, got {tensor.device}")


def _check_planes(name: str, tensor: Tensor, B: int, H: int) -> None:
    batches, heads = tensor.shape[:2]
    if (batches != 1 and batches != B) or (heads != 1 and heads != H):
        raise ValueError(
            f"{name} must have {B} or 1 batches and {H} or 1 heads, got {tuple(tensor.shape)}"
        )


@dataclass(frozen=True)
class Causal(Mask):
    """Keys j ≤ i + offset. With ``offset = Nk − Nq`` the last query sees all keys."""

    offset: int = 0

    def program(self) -> MaskProgram:
        return MaskProgram("band", (-UNBOUNDED, self.offset))


@dataclass(frozen=True)
class Window(Mask):
    """Keys i + offset − left ≤ j ≤ i + offset + right; None leaves a side open."""

    left: int | None
    right: int | None
    offset: int = 0

    def __post_init__(self):
        for name in ("left", "right"):
            if (size := getattr(self, name)) is not None and size < 0:
                raise ValueError(f"{name} must be >= 0 or None, got {size}")

    def program(self) -> MaskProgram:
        low = -UNBOUNDED if self.left is None else self.offset - self.left
        high = UNBOUNDED if self.right is None else self.offset + self.right
        return MaskProgram("band", (low, high))


@dataclass(frozen=True)
class Lengths(Mask):
    """Queries i < query_b and keys j < key_b of padded batches: ``(B,)`` int64 each, or None."""

    query: Tensor | None = None
    key: Tensor | None = None

    def __post_init__(self):
        if self.query is None and self.key is None:
            raise ValueError("Lengths must have query, key or both")
        for name in ("query", "key"):
            if (lengths := getattr(self, name)) is not None:
                _check_ids(name, lengths)

    def program(self) -> MaskProgram:
        rules = {"query_lengths": self.query, "key_lengths": self.key}
        given = {rule: t for rule, t in rules.items() if t is not None}
        joined = " ".join(given) + (" &" if len(given) == 2 else "")
        return MaskProgram(joined, (), tuple(t.contiguous() for t in given.values()))

    def check(self, B, H, Nq, Nk, device) -> None:
        for name, lengths in (("query", self.query), ("key", self.key)):
            if lengths is None:
                continue
            if lengths.shape != (B,):
                raise ValueError(f"mask: {name} lengths must be ({B},), got {tuple(lengths.shape)}")
            _check_device(f"mask: {name} lengths", lengths, device)


@dataclass(frozen=True)
class Segments(Mask):
    """Pairs of equal labels: packed documents, subjects, windows, clusters.

    ``query_ids`` and ``key_ids`` are int64, ``(N,)``, ``(B, N)`` or ``(B, H, N)``; ``key_ids`` are
    the same as ``query_ids`` if None. A batch of fewer labels than scores is repeated: ``(nW, N)``
    serve the windows w mod nW.
    """

    query_ids: Tensor
    key_ids: Tensor | None = None

    def __post_init__(self):
        for name, ids in (("query_ids", self.query_ids), ("key_ids", self.key_ids)):
            if ids is not None:
                _check_ids(name, ids)
                if not 1 <= ids.dim() <= 3:
                    raise ValueError(
                        f"{name} must be (N,), (B, N) or (B, H, N), got {tuple(ids.shape)}"
                    )

    def _ids(self) -> tuple[Tensor, Tensor]:
        def full(ids: Tensor) -> Tensor:
            ids = ids[None, None] if ids.dim() == 1 else ids[:, None] if ids.dim() == 2 else ids
            return ids.contiguous()

        query = full(self.query_ids)
        return query, query if self.key_ids is None else full(self.key_ids)

    def program(self) -> MaskProgram:
        return MaskProgram("segments", (), self._ids())

    def check(self, B, H, Nq, Nk, device) -> None:
        for name, ids, n in zip(("query_ids", "key_ids"), self._ids(), (Nq, Nk), strict=True):
            batches, heads, count = ids.shape
            if count != n or (B and B % max(batches, 1)) or (heads != 1 and heads != H):
                raise ValueError(
                    f"mask: {name} must be ({n},), (B, {n}) or (B, {H}, {n}) with B a divisor of "
                    f"{B}, got {tuple(ids.shape)}"
                )
            _check_device(f"mask: {name}", ids, device)


@dataclass(frozen=True)
class Neighborhood(Mask):
    """The ``kernel`` nearest keys along each axis of a grid in 1-D, 2-D or 3-D, with dilation.

    Queries and keys are the ``prod(shape)`` positions in row-major order. At a border a window
    moves inwards, so that every query sees ``prod(kernel)`` keys. Source: Hassani et al.,
    "Neighborhood Attention Transformer", CVPR 2023, section 3, and its dilated form.
    """

    shape: Sequence[int]
    kernel: int | Sequence[int]
    dilation: int | Sequence[int] = 1

    def __post_init__(self):
        shape = tuple(self.shape)
        if not 1 <= len(shape) <= 3 or any(size < 1 for size in shape):
            raise ValueError(f"shape must be 1 to 3 sizes >= 1, got {shape}")
        object.__setattr__(self, "shape", shape)
        for name in ("kernel", "dilation"):
            value = getattr(self, name)
            value = (value,) * len(shape) if isinstance(value, int) else tuple(value)
            if len(value) != len(shape) or any(size < 1 for size in value):
                raise ValueError(f"{name} must be {len(shape)} integers >= 1, got {value}")
            object.__setattr__(self, name, value)
        for size, kernel, dilation in zip(shape, self.kernel, self.dilation, strict=True):
            if kernel * dilation > size:
                raise ValueError(
                    f"kernel times dilation must be at most the size {size} of its axis, "
                    f"got {kernel} times {dilation}"
                )

    def program(self) -> MaskProgram:
        ints = (len(self.shape), *self.shape, *self.kernel, *self.dilation)
        return MaskProgram("neighborhood", ints)

    def check(self, B, H, Nq, Nk, device) -> None:
        count = 1
        for size in self.shape:
            count *= size
        if Nq != count or Nk != count:
            raise ValueError(
                f"mask: a neighborhood of {self.shape} has {count} queries and keys, "
                f"got {Nq} and {Nk}"
            )


@dataclass(frozen=True)
class Blocks(Mask):
    """Whole blocks of pairs: ``block_mask[..., i // block_q, j // block_k]``.

    ``block_mask`` is bool, ``(nq, nk)`` or ``(B or 1, H or 1, nq, nk)``; ``block_size`` is
    (block_q, block_k) or one integer for both.
    """

    block_mask: Tensor
    block_size: int | tuple[int, int]

    def __post_init__(self):
        _check_ids("block_mask", self.block_mask, (torch.bool,))
        if self.block_mask.dim() not in (2, 4):
            raise ValueError(
                f"block_mask must have 2 or 4 dimensions, got {tuple(self.block_mask.shape)}"
            )
        size = self.block_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if len(size) != 2 or any(edge < 1 for edge in size):
            raise ValueError(f"block_size must be one or two integers >= 1, got {size}")
        object.__setattr__(self, "block_size", size)

    def _blocks(self) -> Tensor:
        x = self.block_mask
        return (x if x.dim() == 4 else x[None, None]).contiguous()

    def program(self) -> MaskProgram:
        return MaskProgram("blocks", self.block_size, (self._blocks(),))

    def check(self, B, H, Nq, Nk, device) -> None:
        blocks = self._blocks()
        _check_planes("mask: block_mask", blocks, B, H)
        needed = tuple(-(-n // edge) for n, edge in zip((Nq, Nk), self.block_size, strict=True))
        if blocks.shape[2:] != needed:
            raise ValueError(
                f"mask: block_mask must have {needed} blocks, got {tuple(blocks.shape[2:])}"
            )
        _check_device("mask: block_mask", blocks, device)


@dataclass(frozen=True)
class Dense(Mask):
    """A bool tensor that broadcasts to (B, H, Nq, Nk), any strides."""

    tensor: Tensor

    def __post_init__(self):
        _check_ids("mask", self.tensor, (torch.bool,))
        if self.tensor.dim() > 4:
            raise ValueError(f"mask must have at most 4 dimensions, got {tuple(self.tensor.shape)}")

    def _full(self) -> Tensor:
        x = self.tensor
        x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape)) if x.dim() < 4 else x
        for dim in range(4):  # what is expanded is looked at once
            if x.stride(dim) == 0 and x.shape[dim] > 1:
                x = x.narrow(dim, 0, 1)
        return x

    def program(self) -> MaskProgram:
        return MaskProgram("dense", (), (self._full(),))

    def check(self, B, H, Nq, Nk, device) -> None:
        shape = (1,) * (4 - self.tensor.dim()) + tuple(self.tensor.shape)
        if any(n != 1 and n != m for n, m in zip(shape, (B, H, Nq, Nk), strict=True)):
            raise ValueError(
                f"mask must broadcast to {(B, H, Nq, Nk)}, got {tuple(self.tensor.shape)}"
            )
        _check_device("mask", self.tensor, device)


@dataclass(frozen=True)
class MaskPlan(Mask):
    """A mask packed into bits, with the state of every tile of 64 × 64; made by ``mask.plan``.

    Attributes:
        words: ``(B', H', Nq or 1, ⌈Nk / 64⌉)`` int64.
        states: ``(B', H', ⌈Nq / 64⌉, ⌈Nk / 64⌉)`` uint8: 0 empty, 1 partial, 2 full.
        shape: (B, H, Nq, Nk) of the scores it was made for.
    """

    words: Tensor
    states: Tensor
    shape: tuple[int, int, int, int]

    def program(self) -> MaskProgram:
        return MaskProgram("bits", (), (self.words, self.states))

    def check(self, B, H, Nq, Nk, device) -> None:
        _, _, *sizes = self.shape
        batches, heads = (max(count, 1) for count in self.words.shape[:2])
        if sizes != [Nq, Nk] or B % batches or H % heads:
            raise ValueError(
                f"mask: the plan was made for {tuple(self.shape)}, got scores of {(B, H, Nq, Nk)}"
            )
        _check_device("mask", self.words, device)

    def skipped(self) -> float:
        """The fraction of tiles that no kernel visits."""
        return (self.states == EMPTY).float().mean().item()


@dataclass(frozen=True)
class Composition(Mask):
    """``a & b``, ``a | b`` or ``~a``."""

    operator: str
    parts: tuple[Mask, ...]

    def program(self) -> MaskProgram:
        of_parts = [part.program() for part in self.parts]
        return MaskProgram(
            " ".join([*(p.program for p in of_parts), self.operator]),
            tuple(n for p in of_parts for n in p.ints),
            tuple(t for p in of_parts for t in p.tensors),
        )

    def check(self, B, H, Nq, Nk, device) -> None:
        for part in self.parts:
            part.check(B, H, Nq, Nk, device)


def _joined(operator: str, left: Mask, right: Mask) -> Mask:
    if isinstance(right, Tensor):
        right = Dense(right)
    if not isinstance(right, Mask):
        return NotImplemented
    return Composition(operator, (left, right))
