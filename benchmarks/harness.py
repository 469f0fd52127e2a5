"""Runs cases: checks every provider against the truth, times those that are right, in turns."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from weft.benchmarks.machine import Limits, describe, measure_limits
from weft.benchmarks.measure import Case, is_wrong, time_interleaved
from weft.benchmarks.memory import peak_extra
from weft.benchmarks.providers import Provider, providers_of
from weft.dispatch import Dispatcher
from weft.ops.cases import discover


@dataclass
class Row:
    """One line of a table: an op, workload, dtype and pass as one provider does it."""

    family: str
    op: str
    workload: str
    dtype: str
    pass_: str
    provider: str
    status: str = "ok"  # or "wrong", "failed", "missing", with the reason in `note`
    note: str = ""
    error: float | None = None  # largest, over the largest true value
    median: float | None = None  # seconds
    min: float | None = None
    ratio: float | None = None  # to the fastest provider that is not weft
    memory: float | None = None  # peak extra, bytes
    fraction: float | None = None  # of the machine's limit
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What is run, and for how long: ``seconds`` of turns per provider and pass."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    quick: bool = False  # small workloads only
    seconds: float = 1.5
    compiled: bool = True
    memory: bool = True


def cases_of(settings: Settings, name: str | None = None) -> Iterator[Case]:
    """Every workload, dtype by dtype, made when it is reached. For a quick run an op gives the
    workloads that are marked so, or its first."""
    for family, cases in discover():
        if name not in (None, family, cases.name):
            continue
        chosen = cases.workloads
        if settings.quick:
            chosen = [w for w in cases.workloads if w.quick] or cases.workloads[:1]
        for workload in chosen:
            for dtype in dict.fromkeys(map(cases.dtype_near, settings.dtypes)):
                yield Case(family, cases, workload, dtype, settings.device)


def run_case(case: Case, limits: Limits, settings: Settings) -> list[Row]:
    """The rows of a case: every provider and pass, also those that cannot be timed."""
    torch._dynamo.reset()
    providers = providers_of(case.family, case.cases, settings.compiled)
    checked = check(case, providers)
    rows = []
    for pass_ in case.passes:
        mine = [_row(case, pass_, provider, *checked[provider.name]) for provider in providers]
        right = {row.provider: row for row in mine if row.status == "ok"}
        functions = {p.name: p.function for p in providers if p.name in right}
        times = time_interleaved(case, functions, pass_, settings.seconds) if functions else {}
        floor = limits.seconds(*case.work(pass_), case.dtype)
        for name, found in times.items():
            row = right[name]
            row.times, row.median, row.min = tuple(found), median(found), min(found)
            row.fraction = floor / row.median
        others = [row.median for name, row in right.items() if name != "weft"]
        for row in right.values():
            row.ratio = row.median / min(others) if others else None
        rows += mine
    if settings.memory:
        for provider in providers:
            own = [row for row in rows if row.provider == provider.name and row.status == "ok"]
            peaks = peak_extra(case, provider.name, provider.function) if own else {}
            for row in own:
                row.memory = peaks.get(row.pass_)
    return rows


def check(case: Case, providers: list[Provider]) -> dict[str, tuple]:
    """By provider: status, note (what ran, or why not), errors by pass, plain PyTorch's errors."""
    truth = case.truth()
    checked, plain = {}, dict.fromkeys(case.passes, 0.0)
    for provider in sorted(providers, key=lambda p: p.name != "pytorch"):  # the yardstick first
        if provider.function is None:
            checked[provider.name] = ("missing", provider.reason, {}, plain)
            continue
        try:
            with implementations() as ran:
                errors = case.evaluate(provider.function).errors(truth)
        except Exception as error:  # a peer may fail in any way; the others still run
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            checked[provider.name] = ("failed", reason, {}, plain)
            continue
        if provider.name == "pytorch":
            plain.update(errors)
        checked[provider.name] = ("ok", ", ".join(ran), errors, plain)
    return checked


def _row(case: Case, pass_: str, provider: Provider, status, note, errors, plain) -> Row:
    row = Row(
        case.family,
        case.cases.name,
        case.workload.name,
        str(case.dtype).removeprefix("torch."),
        pass_,
        provider.name,
        status,
        note,
    )
    if status != "ok":
        return row
    row.error = errors[pass_]
    if row.error is None:
        row.status, row.note = "failed", "has no gradient"
    elif is_wrong(row.error, plain[pass_], case.dtype):
        row.status, row.note = "wrong", f"error {row.error:.2g}, plain PyTorch's {plain[pass_]:.2g}"
    return row


class implementations:
    """The list of implementations that weft's dispatch chooses inside the block."""

    def __enter__(self) -> list[str]:
        names: list[str] = []
        self.choose = choose = Dispatcher.choose

        def watched(dispatcher, *args):
            chosen = choose(dispatcher, *args)
            if chosen.name not in names:
                names.append(chosen.name)
            return chosen

        Dispatcher.choose = watched
        return names

    def __exit__(self, *_) -> None:
        Dispatcher.choose = self.choose


def run(
    settings: Settings,
    name: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> dict:
    """Measures the limits, then runs every case; ``done`` gets the rows of each when it is over."""
    progress("measuring this machine")
    limits = measure_limits(settings.device, list(settings.dtypes))
    rows: list[Row] = []
    for case in cases_of(settings, name):
        progress(case.name)
        rows += (new := run_case(case, limits, settings))
        done(new)
    return {"machine": describe(settings.device), "limits": limits.as_dict(), "rows": rows}


def save(report: dict, path: Path) -> None:
    """The report as JSON; times in seconds, memory in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in report["rows"]]
    for row in rows:
        row["pass"] = row.pop("pass_")
    path.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
