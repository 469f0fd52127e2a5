"""Text, tables and progress for a terminal: with rich where it is installed, plain without."""

import contextlib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

HAS_RICH = find_spec("rich") is not None
STYLES = {"good": "green", "bad": "bold red", "weak": "dim", "head": "bold cyan", "": ""}
PLAIN_WIDTH = 60  # of a cell, before its text is wrapped

Cell = str | tuple[str, str]  # text, or (text, one of STYLES)


def missing_extra(purpose: str, *modules: str) -> str | None:
    """A sentence with the pip command, if one of these is not installed."""
    distributions = {"sklearn": "scikit-learn"}
    absent = [distributions.get(name, name) for name in modules if find_spec(name) is None]
    if not absent:
        return None
    return f"{purpose} needs {' and '.join(absent)}: pip install {' '.join(absent)}"


def _split(cell: Cell) -> tuple[str, str]:
    return cell if isinstance(cell, tuple) else (cell, "")


class Console:
    """Prints to stdout; progress goes to stderr, so that the output can be piped."""

    def __init__(self):
        if HAS_RICH:
            from rich.console import Console as Rich

            width = None if sys.stdout.isatty() else 160  # a pipe has no width of its own
            self.rich = Rich(highlight=False, width=width)
            self.progress_rich = Rich(stderr=True)

    def text(self, text: str = "", style: str = "") -> None:
        if HAS_RICH:
            self.rich.print(text, style=STYLES[style], markup=False, soft_wrap=True)
        else:
            print(text)

    def heading(self, text: str) -> None:
        self.text()
        self.text(text, "head")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], right: Sequence[int] = ()
    ) -> None:
        """``right`` are the columns that are aligned to the right."""
        if not HAS_RICH:
            _plain_table(columns, rows, right)
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index in right else "left")
        for row in rows:
            table.add_row(*(Text(text, STYLES[style]) for text, style in map(_split, row)))
        self.rich.print(table)

    @contextlib.contextmanager
    def progress(self, total: int | None = None) -> Iterator:
        """Yields ``advance(text, steps=1)``: a bar if the total is known, else a spinner."""
        if not HAS_RICH or not self.progress_rich.is_terminal:
            yield lambda text, steps=1: None
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        bars = (BarColumn(), TextColumn("{task.percentage:>3.0f}%")) if total else ()
        columns = (SpinnerColumn(), *bars, TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.progress_rich, transient=True) as progress:
            task = progress.add_task("", total=total)

            def advance(text: str, steps: int = 1) -> None:
                progress.update(task, description=text, advance=steps)

            yield advance

    def error(self, text: str) -> None:
        print(f"weft: {text}", file=sys.stderr)


def _plain_table(columns, rows, right) -> None:
    def wrapped(cell: Cell) -> list[str]:
        return textwrap.wrap(_split(cell)[0], PLAIN_WIDTH) or [""]

    lines = []
    for row in [columns, *rows]:
        cells = [wrapped(cell) for cell in row]
        height = max(len(cell) for cell in cells)
        lines += [[c[i] if i < len(c) else "" for c in cells] for i in range(height)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def show(line):
        pairs = enumerate(zip(line, widths, strict=True))
        return "  ".join(t.rjust(w) if i in right else t.ljust(w) for i, (t, w) in pairs).rstrip()

    print(show(lines[0]), "  ".join("-" * w for w in widths), sep="\n")
    print(*(show(line) for line in lines[1:]), sep="\n")
