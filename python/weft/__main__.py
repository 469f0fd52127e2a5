"""``python -m weft``: what runs here; ``bench``: how fast; ``demo``: what it is good for."""

import argparse
import sys
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "float64")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m weft", description="Without a command: what runs on this machine, and why."
    )
    commands = main.add_subparsers(dest="command", metavar="{bench,demo}")
    bench = commands.add_parser(
        "bench", help="time every op beside plain PyTorch, torch.compile and installed peers"
    )
    bench.add_argument("name", nargs="?", help="one family or one op; all if left out")
    bench.add_argument("--quick", action="store_true", help="small workloads, short runs")
    bench.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="may be given several times (float32 and bfloat16 if left out)",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    bench.add_argument("--plot", type=Path, metavar="DIR", help="draw one PNG per op there")
    demo = commands.add_parser(
        "demo", help="train a Grassmann classifier beside a softmax head, then check and time ops"
    )
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the plot")
    return main


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.command == "bench":
        from weft.cli.bench import bench

        return bench(given)
    if given.command == "demo":
        from weft.cli.demo import demo

        return demo(given.out)
    from weft.cli.status import status

    return status()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
