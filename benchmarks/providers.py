"""Who computes an op: weft, plain PyTorch, ``torch.compile`` of it, and installed peers."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

import torch

import weft.benchmarks
from weft.ops.cases import OpCases, discover


@dataclass(frozen=True)
class Peer:
    """Another package that computes an op of ours, declared in ``bench_<family>.py``.

    ``load`` imports it and returns a function with the arguments of ours, or raises
    ``NotImplementedError`` with the reason where it has no such option, dtype or device.
    """

    name: str
    op: str
    module: str  # what is imported
    distribution: str  # what pip installs
    load: Callable[[], Callable]
    compiles: bool = False  # with Inductor, for a minute: not where the compiler is left out


@dataclass(frozen=True)
class Provider:
    """A function with the arguments of the op, or the reason in words why there is none."""

    name: str
    function: Callable | None
    reason: str | None = None


def peers_of(family: str) -> list[Peer]:
    """The peers that a family's benchmark file declares, installed or not."""
    names = {module.name for module in iter_modules(weft.benchmarks.__path__)}
    if f"bench_{family}" not in names:
        return []
    return import_module(f"weft.benchmarks.bench_{family}").PEERS


def providers_of(family: str, cases: OpCases, compiled: bool = True) -> list[Provider]:
    """weft first, then the others in the order in which tables show them."""
    providers = [Provider("weft", cases.function), Provider("pytorch", cases.plain)]
    if compiled:
        providers.append(Provider("compile", torch.compile(cases.plain, dynamic=False)))
    for peer in peers_of(family):
        if peer.op == cases.name and (compiled or not peer.compiles):
            providers.append(_provider_of_peer(peer))
    return providers


def _provider_of_peer(peer: Peer) -> Provider:
    if find_spec(peer.module) is None:
        return Provider(peer.name, None, f"not installed: pip install {peer.distribution}")
    try:
        return Provider(peer.name, peer.load())
    except (ImportError, NotImplementedError) as error:
        return Provider(peer.name, None, str(error))


def names() -> list[str]:
    """The families that have cases, and their ops."""
    found = list(discover())
    return sorted({family for family, _ in found}) + [cases.name for _, cases in found]
