"""Training data chosen for a target, on scikit-learn's digits.

    python examples/targeted_selection.py [--quick] [--out FOLDER]

The target is a handful of images of three digits. The pool from which training data are taken is
large and mostly of no use: all ten digits, and images whose pixels were shuffled, with labels that
mean nothing. TAROT (``weft.nn.TransportSelection``) sees the images alone, no labels, and chooses
those that bring the transport distance to the target down. A logistic regression trained on them is
compared with ones trained on as many images taken at random, taken by the mean similarity to the
target, and on the whole pool, all tested on other images of the three digits. A picture of what was
chosen goes into FOLDER (out/ if not given).
"""

import argparse
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import weft
from weft.cli.console import Console

WANTED = (3, 5, 8)
TARGETS, JUNK, FEATURES, SEEDS = 60, 900, 20, (0, 1, 2, 3, 4)


class Data:
    """A split of the digits: target images, the pool with its labels, test images of WANTED."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
        x = x.float() / 16
        order = torch.randperm(len(x), generator=generator)
        x, y = x[order], y[order]
        wanted = torch.isin(y, torch.tensor(WANTED)).nonzero()[:, 0]
        self.targets = x[wanted[:TARGETS]]
        tested = wanted[TARGETS : TARGETS + 200]
        self.test = x[tested], y[tested]
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[wanted[: TARGETS + 200]] = False
        junk = x[torch.randint(len(x), (JUNK,), generator=generator)]
        shuffled = torch.rand(JUNK, x.shape[1], generator=generator).argsort(1)
        noise = torch.randint(10, (JUNK,), generator=generator)
        self.pool = torch.cat([x[rest], junk.gather(1, shuffled)])
        self.labels = torch.cat([y[rest], noise])
        self.useful = torch.cat([torch.isin(y[rest], torch.tensor(WANTED)), torch.zeros(JUNK) > 0])

    def features(self) -> tuple[Tensor, Tensor]:
        """The main directions of pool and targets together."""
        both = PCA(FEATURES, svd_solver="full").fit_transform(torch.cat([self.pool, self.targets]))
        both = torch.tensor(both).float()
        return both[: len(self.pool)], both[len(self.pool) :]

    def accuracy(self, chosen: Tensor) -> float:
        """Of a classifier trained on these images of the pool."""
        model = LogisticRegression(max_iter=2000).fit(self.pool[chosen], self.labels[chosen])
        return float(model.score(*self.test))


def selections(data: Data, seed: int, folds: int) -> dict[str, Tensor]:
    """Indices into the pool by each way of choosing."""
    candidates, targets = data.features()
    tarot = weft.nn.TransportSelection(folds=folds, seed=seed)
    chosen = tarot.minimize_distance(candidates, targets).indices
    x, y = tarot.features(candidates, targets)
    generator = torch.Generator().manual_seed(seed)
    return {
        "TAROT": chosen,
        "TAROT, fixed size": tarot.fixed_size(candidates, targets, len(chosen)).indices,
        "mean similarity": (x @ y.mT).mean(1).topk(len(chosen)).indices,
        "random": torch.randperm(len(x), generator=generator)[: len(chosen)],
        "the whole pool": torch.arange(len(x)),
    }


def draw(data: Data, found: dict[str, Tensor], rows: dict[str, list], folder: Path) -> Path:
    """Targets, what two ways have chosen, and the accuracies."""
    from weft.benchmarks.plots import INK, new_figure, pyplot

    figure, axes = new_figure(1, 4, (14, 3.8))
    grid = lambda x: x[:64].reshape(8, 8, 8, 8).transpose(1, 2).reshape(64, 64)  # noqa: E731
    spread = lambda n: torch.linspace(0, n - 1, 64).long()  # noqa: E731
    shown = {"target": data.targets[spread(len(data.targets))]}
    for name in ("TAROT", "random"):
        shown[f"chosen: {name}"] = data.pool[found[name][spread(len(found[name]))]]
    for place, (name, images) in zip(axes, shown.items(), strict=False):
        place.imshow(grid(images), cmap="gray_r")
        place.set(xticks=[], yticks=[])
        place.grid(False)
        place.set_title(name, fontsize=10, loc="left")
    last = axes[3]
    accuracies = [100 * mean(score for score, *_ in row) for row in rows.values()]
    last.barh(list(rows), accuracies, color="#3b6ea5")
    last.invert_yaxis()
    last.set_xlim(0, 100)
    last.set_title("test accuracy, %", fontsize=10, loc="left")
    figure.suptitle(
        f"Training data for the digits {WANTED}", x=0.012, ha="left", fontweight="bold", color=INK
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "targeted_selection.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, fewer folds")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    options = parser.parse_args()
    seeds, folds = (SEEDS[:1], 3) if options.quick else (SEEDS, 10)
    rows: dict[str, list] = {}
    start = time.perf_counter()
    with Console().progress(len(seeds)) as advance:
        for seed in seeds:
            data = Data(seed)
            found = selections(data, seed, folds)
            for name, chosen in found.items():
                useful = float(data.useful[chosen].double().mean())
                row = (data.accuracy(chosen), useful, len(chosen))
                rows.setdefault(name, []).append(row)
            advance(f"split {seed + 1} of {len(seeds)}")
    pool = len(data.pool)
    share = float(data.useful.double().mean())
    print(f"pool of {pool} images, {share:.0%} of the digits {WANTED}; {TARGETS} target images")
    for name, row in rows.items():
        scores, useful, sizes = zip(*row, strict=True)
        spread = f" ± {100 * stdev(scores):.1f}" if len(scores) > 1 else ""
        print(
            f"{name + ':':18} test accuracy {100 * mean(scores):.1f}%{spread}, "
            f"{mean(sizes):.0f} images, {100 * mean(useful):.0f}% of the wanted digits"
        )
    print(f"{time.perf_counter() - start:.0f} s; picture: {draw(data, found, rows, options.out)}")


if __name__ == "__main__":
    main()
