"""Chooses, inside an op, the implementation that runs.

Each implementation declares its limits and says in words why it does not run; the first with no
reason against it does. The last one is the reference, which never declines.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

_pin: str | None = None  # of the process, not of the thread: a GPU backward runs in autograd's own


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op, with its limits as data.

    ``unavailable`` says why it cannot run on this machine at all; ``refuses`` looks at the
    arguments (shapes, options) and returns a sentence, or None.
    """

    name: str
    run: Callable
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    unavailable: Callable[[], str | None] = lambda: None
    refuses: Callable[..., str | None] | None = None

    def static_reasons(self, device: str, dtype: torch.dtype) -> list[str]:
        """Why it cannot run on this device and dtype, whatever the shapes."""
        if (text := self.unavailable()) is not None:
            return [text]
        why = []
        if self.devices is not None and device not in self.devices:
            why.append(f"runs on {' and '.join(sorted(self.devices))}, not on {device}")
        if self.dtypes is not None and dtype not in self.dtypes:
            names = sorted(str(known).removeprefix("torch.") for known in self.dtypes)
            why.append(f"takes {', '.join(names)}, not {str(dtype).removeprefix('torch.')}")
        return why

    def not_supported_reasons(self, *args) -> list[str]:
        """In words, why it does not run for these arguments; empty if it does."""
        why = self.static_reasons(args[0].device.type, args[0].dtype)
        if not why and self.refuses is not None and (text := self.refuses(*args)) is not None:
            why = [text]
        return why


class Dispatcher:
    """Calls the first implementation with no reason against it; the first argument is a tensor."""

    def __init__(self, op: str, implementations: list[Implementation]):
        self.op, self.implementations = op, implementations
        self._candidates: dict = {}  # (pin, device, dtype) -> those that only shapes can refuse

    def __call__(self, *args):
        return self.choose(*args).run(*args)

    def choose(self, *args) -> Implementation:
        first: Tensor = args[0]
        key = (_pin, first.device.type, first.dtype)
        candidates = self._candidates.get(key)
        if candidates is None:
            candidates = self._candidates[key] = [
                known
                for known in self.implementations
                if _pin in (None, known.name) and not known.static_reasons(*key[1:])
            ]
        for known in candidates:
            if known.refuses is None or known.refuses(*args) is None:
                return known
        named = [known for known in self.implementations if known.name == _pin]
        why = named[0].not_supported_reasons(*args) if named else ["it has no such implementation"]
        raise NotImplementedError(
            f"{self.op}: {_pin!r} is pinned but cannot run here: {'; '.join(why)}"
        )


def transformed() -> bool:
    """Inside ``torch.func`` or forward-mode AD, which would silently see no derivative of an op."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def pinned() -> str | None:
    """The implementation that ``weft.use`` pins now."""
    return _pin


def _set_pin(name: str | None) -> None:
    global _pin
    _pin = name


# What torch.compiler.disable sets; calling that would import PyTorch's compiler, which takes longer
# than all of weft.
_set_pin._torchdynamo_disable = True
_set_pin._torchdynamo_disable_msg = (
    "weft.use acts when an op runs: put it around the call of the compiled function"
)


class use:
    """Pins the implementation of every op: ``with weft.use("reference"): ...``.

    ``name`` is ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None for none. The pin
    holds for the whole process and the backward remembers it. An op that cannot run so raises
    ``NotImplementedError`` with the reasons. For tests and benchmarks, not for threads.
    """

    NAMES = ("reference", "cpu", "triton", "cuda")

    def __init__(self, name: str | None):
        if name is not None and name not in self.NAMES:
            raise ValueError(f"name must be one of {self.NAMES} or None, got {name!r}")
        self.name = name

    def __enter__(self) -> None:
        self.before = _pin
        _set_pin(self.name)

    def __exit__(self, *_) -> None:
        _set_pin(self.before)
