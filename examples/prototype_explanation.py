"""A classifier that explains itself by prototypes, on scikit-learn's digits.

    python examples/prototype_explanation.py [--quick] [--out FOLDER]

Trains the case-based prototype network (a small autoencoder; a digit is classified by nothing but
its squared distances to 15 prototypes in feature space) and, for comparison, the same encoder under
a linear head. It prints the accuracies of both, decodes the prototypes into images, and explains
single decisions: the prototypes and the training digits that are nearest. FOLDER (out/ if not
given) gets the pictures.
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.cli.console import Console
from weft.nn import CaseBasedLoss, PrototypeLayer

PROTOTYPES, FEATURES, CLASSES = 15, 40, 10
EPOCHS, BATCH, RATE = 250, 64, 2e-3
NEIGHBOURS = 5


def encoder() -> nn.Module:
    """8 x 8 pixels to 40 features."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, FEATURES))


def decoder() -> nn.Module:
    """40 features to 8 x 8 pixels in [0, 1]."""
    layers = nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 64), nn.Sigmoid()
    return nn.Sequential(*layers, nn.Unflatten(1, (1, 8, 8)))


class PrototypeNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()
        self.prototypes = PrototypeLayer(FEATURES, PROTOTYPES)
        self.last = nn.Linear(PROTOTYPES, CLASSES, bias=False)
        self.criterion = CaseBasedLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.prototypes(self.encoder(x)))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.encoder(x)
        logits = self.last(self.prototypes(z))
        return self.criterion(logits, y, self.decoder(z), x, z, self.prototypes.prototypes).loss

    def classes(self) -> Tensor:
        """The class that each prototype speaks for: of a digit that is the prototype itself."""
        return self.last(self.prototypes(self.prototypes.prototypes)).argmax(1)


class LinearNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.last = encoder(), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(x))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y)


def train(network: nn.Module, x: Tensor, y: Tensor, epochs: int, advance, name: str) -> float:
    """Seconds that it took."""
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    start = time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            network.loss(x[batch], y[batch]).backward()
            optimizer.step()
        schedule.step()
        advance(f"{name}: epoch {epoch + 1} of {epochs}")
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return (network(x).argmax(1) == y).double().mean().item()


@torch.no_grad()
def explain(network: PrototypeNetwork, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor):
    """Of every test digit: the prediction, the nearest prototypes, the nearest training digits."""
    z, z_test = network.encoder(x), network.encoder(x_test)
    prototypes = weft.nearest(z_test, network.prototypes.prototypes, k=3)
    neighbours = weft.nearest(z_test, z, k=NEIGHBOURS)
    votes = F.one_hot(y[neighbours.indices], CLASSES).sum(1).argmax(1)
    print(
        f"{NEIGHBOURS} nearest training digits in feature space, by vote: "
        f"{(votes == y_test).double().mean():.1%}"
    )
    return network(x_test).softmax(1), prototypes, neighbours


def chosen_digits(probabilities: Tensor, y_test: Tensor) -> list[int]:
    """The surest right decision of some classes, the least sure one, and the wrong ones."""
    sure, predicted = probabilities.max(1)
    right = predicted == y_test
    rows = [int((sure * (right & (y_test == c))).argmax()) for c in (2, 5)]
    rows.append(int(torch.where(right, sure, 2.0).argmin()))
    wrong = (~right).nonzero()[:, 0]
    rows += wrong[sure[wrong].argsort(descending=True)][:3].tolist()
    return rows


def describe(rows, probabilities, prototypes, classes, y_test) -> None:
    print("decisions, each with its nearest prototypes (squared distance in feature space):")
    for row in rows:
        sure, predicted = probabilities[row].max(0)
        nearest = ", ".join(
            f"a {classes[j]} at {d:.2f}"
            for d, j in zip(prototypes.values[row], prototypes.indices[row], strict=True)
        )
        verdict = "right" if predicted == y_test[row] else f"wrong, it is a {y_test[row]}"
        print(f"  digit {row}: {predicted} with {sure:.0%} ({verdict}); {nearest}")


@torch.no_grad()
def draw(network, rows, results, x, y, x_test, y_test, accuracies, folder: Path) -> Path:
    """Prototypes above; below a row for each decision."""
    from weft.benchmarks.plots import BLUE, GREEN, GREY, INK, ORANGE, new_figure, pyplot

    probabilities, prototypes, neighbours = results
    images = network.decoder(network.prototypes.prototypes)[:, 0]
    classes = network.classes()
    widths = [1, 1, 0.18, *[1] * 3, 0.18, *[1] * NEIGHBOURS]  # with gaps between what is alike
    figure, _ = new_figure(1, 1, (11.5, 3.4 + 1.3 * len(rows)))
    figure.clear()
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.03)
    above, below = figure.subfigures(2, 1, height_ratios=(2.9, 0.5 + 1.3 * len(rows)))

    def show(axes, image, caption="", color=INK, edge=None):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.set_xlabel(caption, color=color, fontsize=9, labelpad=3)
        for spine in axes.spines.values():
            spine.set(visible=True, color=edge or "#d5d9df", linewidth=2 if edge else 0.8)

    above.suptitle(
        f"What the network knows: its {PROTOTYPES} prototypes, decoded\n",
        x=0.012,
        ha="left",
        fontweight="bold",
        fontsize=12,
    )
    above.text(
        0.012,
        0.895,
        f"A digit is classified by its distances to these alone: test accuracy "
        f"{accuracies[0]:.1%}; the same encoder under a linear head {accuracies[1]:.1%}",
        va="top",
        color=GREY,
        fontsize=9.5,
    )
    order = classes.argsort(stable=True)
    per_row = (PROTOTYPES + 1) // 2
    for axes in above.subplots(2, per_row).flat:
        axes.set_axis_off()
    for axes, j in zip(above.axes, order.tolist(), strict=False):
        axes.set_axis_on()
        show(axes, images[j], f"speaks for {classes[j]}")
    below.suptitle(
        "How it decides: single test digits, with squared distances in feature space",
        x=0.012,
        ha="left",
        fontweight="bold",
        fontsize=12,
    )
    grid = below.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths)
    for axes in grid[:, [2, 6]].flat:
        axes.set_axis_off()
    heads = {0: "test digit", 1: "decoded", 4: "nearest prototypes", 9: "nearest training digits"}
    for column, text in heads.items():
        grid[0, column].set_title(text, fontsize=9.5, loc="center", color=INK, pad=6)
    reconstructed = network.decoder(network.encoder(x_test[rows]))[:, 0]
    for axes, row, decoded in zip(grid, rows, reconstructed, strict=True):
        sure, predicted = probabilities[row].max(0)
        right = bool(predicted == y_test[row])
        color = GREEN if right else ORANGE
        verdict = "right" if right else f"it is a {y_test[row]}"
        show(axes[0], x_test[row, 0], f"{predicted}, {sure:.0%}: {verdict}", color, color)
        show(axes[1], decoded)
        near = zip(axes[3:6], prototypes.values[row], prototypes.indices[row], strict=True)
        for place, distance, j in near:
            show(place, images[j], f"{classes[j]} at {distance:.2f}", BLUE)
        near = zip(axes[7:], neighbours.values[row], neighbours.indices[row], strict=True)
        for place, distance, i in near:
            show(
                place, x[i, 0], f"{y[i]} at {distance:.2f}", INK if y[i] == y_test[row] else ORANGE
            )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prototype_explanation.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ten epochs only")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    given = parser.parse_args()
    epochs = 10 if given.quick else EPOCHS
    torch.set_num_threads(1)  # the layers are too small for more
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16,
        torch.tensor(labels),
        test_size=0.3,
        random_state=0,
        stratify=labels,
    )
    accuracies, networks = [], []
    with Console().progress(2 * epochs) as advance:
        for name, make in (("prototypes", PrototypeNetwork), ("linear head", LinearNetwork)):
            torch.manual_seed(0)
            network = make()
            seconds = train(network, x, y, epochs, advance, name)
            accuracies.append(accuracy(network, x_test, y_test))
            networks.append(network)
            print(f"{name}: test accuracy {accuracies[-1]:.1%} ({epochs} epochs, {seconds:.0f} s)")
    network = networks[0]
    results = explain(network, x, y, x_test, y_test)
    rows = chosen_digits(results[0], y_test)
    with torch.no_grad():
        z = network.encoder(x)
        nearest = weft.nearest(network.prototypes.prototypes, z).indices[:, 0]
        classes = network.classes()
        agree = (y[nearest] == classes).sum()
    print(
        f"prototypes whose nearest training digit is of the class that they speak for: "
        f"{agree} of {PROTOTYPES}"
    )
    describe(rows, results[0], results[1], classes, y_test)
    path = draw(network, rows, results, x, y, x_test, y_test, accuracies, given.out)
    print(f"pictures: {path}")


if __name__ == "__main__":
    main()
