"""``python -m weft bench``: the benchmarks as tables, JSON and plots."""

import argparse

import torch

from weft.benchmarks.harness import Row, Settings, run, save
from weft.benchmarks.machine import is_busy
from weft.benchmarks.providers import names, peers_of
from weft.cli.console import Cell, Console, missing_extra

COLUMNS = (
    "workload", "dtype", "pass", "provider", "median ms", "min ms",
    "vs fastest other", "of limit", "extra MB", "error", "note",
)  # fmt: skip
RIGHT = range(4, 10)


def bench(given: argparse.Namespace) -> int:
    console = Console()
    if given.name is not None and given.name not in names():
        console.error(f"no family or op {given.name!r}; there are: {', '.join(names())}")
        return 2
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        console.error("--device cuda: torch finds no CUDA device here")
        return 2
    if given.plot is not None and (why := missing_extra("--plot", "matplotlib")):
        console.error(why)
        return 2
    dtypes = tuple(getattr(torch, name) for name in given.dtype or ("float32", "bfloat16"))
    settings = Settings(device, dtypes, given.quick, seconds=0.3 if given.quick else 0.5)
    with console.progress() as advance:
        report = run(settings, given.name, advance)
    rows: list[Row] = report["rows"]
    show_machine(console, report)
    for op in dict.fromkeys(row.op for row in rows):
        show_op(console, op, [row for row in rows if row.op == op])
    if given.json is not None:
        save(report, given.json)
        console.text(f"results: {given.json}")
    if given.plot is not None:
        from weft.benchmarks.plots import plot_ops

        for path in plot_ops(report, given.plot):
            console.text(f"plot: {path}")
    return 1 if wrong(console, rows) else 0


def show_machine(console: Console, report: dict) -> None:
    machine, limits = report["machine"], report["limits"]
    rates = ", ".join(f"{name} {r:,.0f}" for name, r in limits["matrix_gflop_per_s"].items())
    parts = [machine["device"]]
    if machine["type"] == "cpu":
        parts.append(f"{machine['threads']} threads, {machine['instruction_set']} kernels")
    console.heading("; ".join([*parts, f"torch {machine['torch']}", machine["date"]]))
    console.text(
        f"limits, measured now: copies {limits['copy_gb_per_s']:.1f} GB/s, "
        f"matrix products {rates} GFLOP/s"
    )
    if is_busy(machine):
        console.text(
            f"The machine is busy (load {machine['load']}): expect longer times and little from "
            "their ratios.",
            "bad",
        )


def show_op(console: Console, op: str, rows: list[Row]) -> None:
    console.heading(op)
    shown: list[tuple[Cell, ...]] = []
    previous: tuple | None = None
    for row in rows:
        case = (row.workload, row.dtype, row.pass_)
        start = case if case != previous else ("", "", "")
        previous = case
        shown.append((*start, *cells(row)))
    console.table(COLUMNS, shown, RIGHT)
    if not any(peer.op == op for peer in peers_of(rows[0].family)):
        console.text("No package that computes this op is known to the benchmarks.", "weak")


def cells(row: Row) -> tuple[Cell, ...]:
    """From the provider on. A provider that was not timed shows why."""
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.status != "ok":
        style = "weak" if row.status == "missing" else "bad"
        return (row.provider, "", "", "", "", "", error, (f"{row.status}: {row.note}", style))
    ratio: Cell = "" if row.ratio is None else f"{row.ratio:.2f}"
    if row.provider == "weft" and row.ratio is not None:
        ratio = (ratio, "good" if row.ratio <= 1 else "bad")
    memory = "" if row.memory is None else f"{row.memory / 2**20:.1f}"
    median, least = f"{row.median * 1e3:.3f}", f"{row.min * 1e3:.3f}"
    return (row.provider, median, least, ratio, f"{row.fraction:.0%}", memory, error, row.note)


def wrong(console: Console, rows: list[Row]) -> list[Row]:
    """The rows where weft itself failed; they decide the exit code."""
    ours = [row for row in rows if row.provider == "weft" and row.status in ("wrong", "failed")]
    for row in ours:
        where = f"{row.op} {row.workload} {row.dtype} {row.pass_}"
        console.error(f"{where}: {row.status}: {row.note}")
    return ours
