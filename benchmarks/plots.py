"""Plots of benchmark results, and the look of every plot that weft draws."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, wherever there is no display
from matplotlib import pyplot  # noqa: E402

BLUE, ORANGE, GREEN, GREY, INK = "#2f6f9f", "#e0803a", "#4d9a6a", "#8a8f98", "#2b2f36"
COLORS = {"weft": BLUE, "pytorch": ORANGE, "compile": GREEN}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": "#c8ccd2",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    pyplot.rcParams.update(STYLE)
    return pyplot.subplots(rows, columns, figsize=size, layout="constrained")


def note_of(machine: dict) -> str:
    """What a plot says of the machine that it is about."""
    parts = (machine["device"], f"{machine['threads']} threads" * (machine["type"] == "cpu"))
    versions = (f"torch {machine['torch']}", f"weft {machine['weft']}", machine["date"][:10])
    return ", ".join(part for part in (*parts, *versions) if part)


def bar_labels(axes, bars, texts: list[str]) -> None:
    axes.bar_label(bars, texts, padding=4, fontsize=9)


def save_figure(figure, path: Path, note: str) -> Path:
    """Writes the figure, with the machine it is about below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strip = 0.3 / figure.get_figheight()  # for the note, in parts of the figure
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, rect=(0, strip, 1, 1 - strip))
    figure.text(0.99, strip / 3, note, ha="right", va="bottom", fontsize=8, color=GREY)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def plot_ops(report: dict, folder: Path) -> list[Path]:
    """One PNG per op: the time of each provider beside the fastest that is not weft, and its share
    of the machine's limit, by workload; a row of plots per dtype. Of a training step (forward and
    backward) where there is a backward."""
    note, paths = note_of(report["machine"]), []
    for op in dict.fromkeys(row.op for row in report["rows"]):
        rows = [row for row in report["rows"] if row.op == op and row.status == "ok"]
        pass_ = "both" if any(row.pass_ == "both" for row in rows) else "forward"
        rows = [row for row in rows if row.pass_ == pass_]
        if rows:
            paths.append(_plot_op(op, pass_, rows, note, folder))
    return paths


def _plot_op(op: str, pass_: str, rows: list, note: str, folder: Path) -> Path:
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    workloads = list(dict.fromkeys(row.workload for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    thickness = 0.8 / len(providers)
    lines = len(workloads) * (len(providers) + 1)
    figure, axes = new_figure(len(dtypes), 2, (13, len(dtypes) * (1.3 + 0.27 * lines)))
    what = "forward and backward" if pass_ == "both" else "forward"
    for (times, shares), dtype in zip(axes.reshape(-1, 2), dtypes, strict=True):
        for index, provider in enumerate(providers):
            own = {r.workload: r for r in rows if (r.dtype, r.provider) == (dtype, provider)}
            there = [i for i, name in enumerate(workloads) if name in own]
            places = [i + (index - (len(providers) - 1) / 2) * thickness for i in there]
            chosen = [own[workloads[i]] for i in there]
            look = {"height": 0.9 * thickness, "color": COLORS.get(provider, GREY)}
            bars = times.barh(places, [row.ratio for row in chosen], label=provider, **look)
            bar_labels(times, bars, [f"{1e3 * row.median:.3g} ms" for row in chosen])
            bars = shares.barh(places, [100 * row.fraction for row in chosen], **look)
            bar_labels(shares, bars, [f"{row.fraction:.0%}" for row in chosen])
        times.axvline(1, color=INK, lw=1, ls=(0, (4, 3)))
        times.set(title=f"{dtype}: median time", xlabel="fastest provider that is not weft = 1")
        shares.set(title=f"{dtype}: share of this machine's limit", xlabel="%")
        for one in (times, shares):
            one.margins(x=0.14)
            one.set_yticks(range(len(workloads)), workloads if one is times else [])
            one.set_ylim(len(workloads) - 0.5, -0.5)
            one.tick_params(axis="y", length=0)
            one.grid(axis="y", visible=False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names))
    figure.suptitle(f"{op}, {what}", x=0.01, ha="left", weight="bold")
    return save_figure(figure, folder / f"{op}.png", note)
