"""``python -m weft demo``: two heads on the digits, then every op checked and timed."""

from pathlib import Path

import torch

from weft.benchmarks.harness import Row, Settings, cases_of, run
from weft.cli import digits
from weft.cli.bench import show_machine, wrong
from weft.cli.console import Cell, Console, missing_extra


def demo(out: Path) -> int:
    console = Console()
    if why := missing_extra("the demo", "sklearn", "matplotlib"):
        console.error(why)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(
        device, (torch.float32,), quick=True, seconds=0.1, compiled=False, memory=False
    )
    console.heading("A Grassmann classifier beside a linear softmax head, on the digits")
    steps = digits.TRAININGS + sum(1 for _ in cases_of(settings)) + 1
    with console.progress(steps) as advance:
        results = digits.compare(advance)
        report = run(settings, progress=advance)
    show_heads(console, results)
    show_ops(console, report)
    path = draw(results, report, out)
    console.text()
    console.text(f"plot: {path}", "good")
    return 1 if wrong(console, report["rows"]) else 0


def show_heads(console: Console, results: list[digits.Result]) -> None:
    console.text(
        f"1797 images of 8 x 8 (training 60%, validation 20%, test 20%). Both heads: backbone "
        f"64-{digits.HIDDEN}-{digits.FEATURES}, {digits.EPOCHS} epochs, batches of {digits.BATCH}, "
        f"momentum {digits.MOMENTUM}, weight decay {digits.WEIGHT_DECAY} (none on subspaces),\n"
        f"one of {len(digits.RATES)} learning rates {digits.RATES} chosen on the validation split "
        f"with {len(digits.TUNING_SEEDS)} seeds, then {len(digits.SEEDS)} other seeds; one thread."
    )
    console.text()
    rows: list[tuple[Cell, ...]] = []
    for result in results:
        accuracy, accuracy_spread = digits.spread([100 * a for a in result.accuracies])
        degrees, degrees_spread = digits.spread(result.variability)
        seconds, _ = digits.spread([training.seconds for training in result.trainings])
        rows.append(
            (
                digits.HEADS[result.head],
                f"{result.rate}",
                f"{accuracy:.2f} ± {accuracy_spread:.2f} %",
                f"{degrees:.1f} ± {degrees_spread:.1f}°",
                f"{seconds:.2f} s",
            )
        )
    columns = ("head", "learning rate", "test accuracy", "feature variability", "training")
    console.table(columns, rows, right=range(1, 5))
    console.text(
        "Feature variability: the angle between the features of two test images of one class, in "
        "degrees, averaged over all pairs of the class, then over the classes.\n"
        "± is the standard deviation over the seeds; training is the mean time of one of them.",
        "weak",
    )


def show_ops(console: Console, report: dict) -> None:
    console.heading("Every op on this machine, beside plain PyTorch")
    show_machine(console, report)
    console.text()
    rows: list[tuple[Cell, ...]] = []
    for ours, plain in pairs(report["rows"]):
        if ours.status != "ok" or plain.status != "ok":
            bad = ours if ours.status != "ok" else plain
            what: Cell = (f"{bad.provider} {bad.status}: {bad.note}", "bad")
            rows.append((ours.op, ours.workload, ours.pass_, "", "", "", "", what))
            continue
        speed = plain.median / ours.median
        rows.append(
            (
                ours.op,
                ours.workload,
                ours.pass_,
                f"{ours.median * 1e3:.3f}",
                f"{plain.median * 1e3:.3f}",
                (f"{speed:.2f}x", "good" if speed >= 1 else "bad"),
                f"{ours.error:.1e} ({plain.error:.1e})",
                ours.note,
            )
        )
    columns = ("op", "workload", "pass", "weft ms", "PyTorch ms", "speed", "error", "runs")
    console.table(columns, rows, right=range(3, 7))
    console.text(
        "error: the largest, over the largest value of the float64 truth; in brackets PyTorch's.\n"
        "`python -m weft bench` adds torch.compile, other packages, memory and larger sizes.",
        "weak",
    )


def pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """weft's row and plain PyTorch's of each op, workload and pass."""
    plain = {(r.op, r.workload, r.pass_): r for r in rows if r.provider == "pytorch"}
    return [(r, plain[r.op, r.workload, r.pass_]) for r in rows if r.provider == "weft"]


def draw(results: list[digits.Result], report: dict, out: Path) -> Path:
    """Accuracy by epoch, angles within a class, and the time of the ops, in one PNG."""
    from weft.benchmarks.plots import (
        BLUE,
        GREEN,
        GREY,
        INK,
        ORANGE,
        bar_labels,
        new_figure,
        note_of,
        save_figure,
    )

    timed = [(o, p) for o, p in pairs(report["rows"]) if o.median and p.median]
    height = max(4.6, 1.6 + 0.42 * len(timed))
    figure, (left, middle, right) = new_figure(1, 3, (15, height))
    colors = dict(zip(digits.HEADS, (ORANGE, BLUE), strict=True))
    for result in results:
        color, name = colors[result.head], digits.HEADS[result.head]
        curves = 100 * torch.tensor([t.accuracy for t in result.trainings])
        epochs = range(1, curves.shape[1] + 1)
        left.plot(epochs, curves.mean(0), color=color, lw=2, label=name)
        low, high = curves.min(0).values, curves.max(0).values
        left.fill_between(epochs, low, high, color=color, alpha=0.18, lw=0)
        middle.hist(result.angles, bins=72, range=(0, 180), density=True, color=color, alpha=0.45)
        degrees, _ = digits.spread(result.variability)
        middle.axvline(degrees, color=color, lw=2, label=f"{name}: {degrees:.1f}°")
    worst = min(t.accuracy[4] for result in results for t in result.trainings)
    left.set(title="Test accuracy, %", xlabel="epoch", ylim=(100 * worst - 1, 100))
    left.legend(loc="lower right", title=f"mean and range of {len(digits.SEEDS)} seeds")
    middle.set(title="Angle between features of one class", xlabel="degrees", yticks=[])
    last = max(float(result.angles.quantile(0.999)) for result in results)
    middle.set_xlim(0, min(180, last + 5))
    middle.legend(title="mean over pairs, classes, seeds")
    speeds = [plain.median / ours.median for ours, plain in timed]
    names = [f"{ours.op}\n{ours.pass_}" for ours, _ in timed]
    fill = [GREEN if speed >= 1 else GREY for speed in speeds]
    bars = right.barh(names, [speed - 1 for speed in speeds], left=1, color=fill, height=0.6)
    bar_labels(right, bars, [f"{speed:.2f}×" for speed in speeds])
    right.axvline(1, color=INK, lw=1)
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set_xscale("log")
    right.set_xlim(0.4 * min([*speeds, 1]), 1.9 * max([*speeds, 2]))
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.xaxis.set_minor_formatter(lambda value, _: "")
    right.set(title="Speed of the ops, plain PyTorch = 1", xlabel="times as fast, float32")
    return save_figure(figure, out / "weft_demo.png", note_of(report["machine"]))
