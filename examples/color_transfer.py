"""The colours of one photograph for another, by optimal transport.

    python examples/color_transfer.py [--quick] [--out FOLDER]

Takes colours at random from each of scikit-learn's two photographs, solves the entropic transport
between them (``weft.sinkhorn``), and moves every pixel of either photograph by the map that the
potentials define: the mean of the other's colours, weighted as the plan would weigh them for that
pixel,

    T(x) = Σ_j y_j w_j / Σ_j w_j,   w_j = b_j exp((g_j − |x − y_j|²) / ε),

which is attention with one bias a key (``weft.attention``). It prints the error of the marginals,
the times beside those of POT if that is installed, and how far the channels of the result are from
those of the other photograph, and draws all four into FOLDER (out/ if not given).

Source: Ferradans et al., "Regularized Discrete Optimal Transport", 2014, for the application;
Pooladian and Niles-Weed, "Entropic estimation of optimal transport maps", 2021, for the map.
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

import weft
from weft.cli.console import Console

COLORS, EPSILON, TOLERANCE = 3000, 0.002, 1e-3
NAMES = ("china", "flower")


def photographs() -> list[Tensor]:
    """(rows, columns, 3) in [0, 1]."""
    return [torch.tensor(image).float() / 255 for image in load_sample_images().images]


def sample(photo: Tensor, count: int) -> Tensor:
    pixels = photo.flatten(0, 1)
    return pixels[torch.randperm(len(pixels))[:count]]


def recolored(photo: Tensor, colors: Tensor, g: Tensor) -> Tensor:
    """Every pixel moved by the map of the potential g of ``colors``."""
    pixels = photo.flatten(0, 1)[None, None]
    key = colors[None, None]
    bias = (g - colors.square().sum(1)) / EPSILON
    moved = weft.attention(pixels, key, key, bias=bias[None, None, None], scale=2 / EPSILON)
    return moved.reshape(photo.shape)


def channel_distance(one: Tensor, other: Tensor) -> float:
    """The mean over the channels of the 1-Wasserstein distance of their values."""
    sort = lambda photo: photo.flatten(0, 1).sort(0).values  # noqa: E731
    return float((sort(one) - sort(other)).abs().mean())


def time_of_pot(C: Tensor, iterations: int) -> tuple[float, float]:
    """Seconds of POT's log-domain solver for so many iterations, and its marginal error."""
    import ot

    cost = C.numpy()
    start = time.perf_counter()
    options = dict(method="sinkhorn_log", numItermax=iterations, stopThr=0.0, warn=False)
    plan = ot.sinkhorn([], [], cost, EPSILON, **options)
    return time.perf_counter() - start, float(abs(plan.sum(1) - 1 / len(cost)).sum())


def draw(photos: list[Tensor], results: list[Tensor], folder: Path) -> Path:
    from weft.benchmarks.plots import INK, new_figure, pyplot

    figure, axes = new_figure(2, 2, (11, 8))
    for row, name in enumerate(NAMES):
        titles = (name, f"{name} in the colours of {NAMES[1 - row]}")
        for place, image, title in zip(axes[row], (photos[row], results[row]), titles, strict=True):
            place.imshow(image.clamp(0, 1))
            place.set(xticks=[], yticks=[])
            place.grid(False)
            place.set_title(title, fontsize=10, loc="left")
    figure.suptitle(
        "Colours moved by optimal transport", x=0.012, ha="left", fontweight="bold", color=INK
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "color_transfer.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer colours")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    options = parser.parse_args()
    torch.manual_seed(0)
    photos = photographs()
    colors = [sample(photo, 500 if options.quick else COLORS) for photo in photos]
    with Console().progress(4) as advance:
        C = weft.pairwise_distance(*colors)
        start = time.perf_counter()
        found = weft.sinkhorn(
            C, epsilon=EPSILON, tolerance=TOLERANCE, max_iterations=5000, schedule="anneal"
        )
        seconds = time.perf_counter() - start
        advance("transport solved")
        iterations = int(found.iterations)
        pot = time_of_pot(C, iterations) if find_spec("ot") else None
        advance("compared")
        f, g = found.potentials
        start = time.perf_counter()
        results = [recolored(photos[0], colors[1], g)]
        advance("china recoloured")
        results.append(recolored(photos[1], colors[0], f))
        advance("flower recoloured")
        mapping = time.perf_counter() - start
    error = float(found.marginal_error)
    print(
        f"{len(C)} colours each, epsilon {EPSILON}: marginal error {error:.1e} "
        f"after {iterations} iterations, {seconds:.2f} s"
    )
    if pot is not None:
        print(f"POT, log domain, as many iterations: {pot[0]:.2f} s, marginal error {pot[1]:.1e}")
    count = sum(photo[..., 0].numel() for photo in photos)
    print(f"{count} pixels moved in {mapping:.2f} s")
    for n, name in enumerate(NAMES):
        before = channel_distance(photos[n], photos[1 - n])
        after = channel_distance(results[n], photos[1 - n])
        print(f"{name}: channels {before:.3f} from the other's before, {after:.3f} after")
    print(f"picture: {draw(photos, results, options.out)}")


if __name__ == "__main__":
    main()
