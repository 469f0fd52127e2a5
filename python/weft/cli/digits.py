"""Two heads on one small backbone, trained on scikit-learn's bundled digits, for the demo.

Both heads get the same data, backbone, seeds, epochs, batches, momentum, weight decay and grid of
learning rates; each takes the rate that is best on the validation split, over seeds of its own.
The test split decides nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES, HIDDEN, CLASSES = 64, 256, 10
SUBSPACE_DIM, GAMMA = 4, 25.0
EPOCHS, BATCH, MOMENTUM, WEIGHT_DECAY = 40, 64, 0.9, 5e-4
RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
TRAININGS = 2 * (len(RATES) * len(TUNING_SEEDS) + len(SEEDS))
HEADS = {"linear": "linear + softmax", "grassmann": f"Grassmann, k = {SUBSPACE_DIM}"}


@dataclass(frozen=True)
class Split:
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Training:
    """One training: accuracy on the test split after each epoch, seconds, final test features."""

    accuracy: list[float]
    seconds: float
    features: Tensor


@dataclass(frozen=True)
class Result:
    """A head with its chosen rate and its trainings, one per seed."""

    head: str
    rate: float
    trainings: list[Training]
    angles: Tensor  # degrees, of all test pairs of equal class and of all seeds
    variability: list[float]  # per seed

    @property
    def accuracies(self) -> list[float]:
        return [training.accuracy[-1] for training in self.trainings]


def load() -> tuple[Split, Split, Split]:
    """Training (60%), validation (20%) and test (20%), stratified, pixels in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    first, rest, first_y, rest_y = train_test_split(x, y, test_size=0.4, stratify=y, random_state=0)
    second, third, second_y, third_y = train_test_split(
        rest, rest_y, test_size=0.5, stratify=rest_y, random_state=0
    )

    def split(values, labels):
        return Split(torch.tensor(values / 16, dtype=torch.float32), torch.tensor(labels))

    return split(first, first_y), split(second, second_y), split(third, third_y)


def build(head: str, rate: float) -> tuple[nn.Module, nn.Module, list[torch.optim.Optimizer]]:
    """Backbone, head and their optimizers: the bases move on the Grassmannian, the rest by SGD."""
    from weft.nn import GrassmannClassifier
    from weft.optim import RiemannianSGD

    backbone = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, FEATURES))
    if head == "linear":
        last = nn.Linear(FEATURES, CLASSES)
        everything = [*backbone.parameters(), *last.parameters()]
        sgd = torch.optim.SGD(everything, rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
        return backbone, last, [sgd]
    last = GrassmannClassifier(FEATURES, CLASSES, SUBSPACE_DIM, gamma=GAMMA)
    sgd = torch.optim.SGD(backbone.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
    return backbone, last, [sgd, RiemannianSGD(last.parameters(), rate, momentum=MOMENTUM)]


def train(head: str, rate: float, seed: int, data: Split, held_out: Split) -> Training:
    """The learning rate falls to zero along a cosine."""
    torch.manual_seed(seed)
    backbone, last, optimizers = build(head, rate)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, EPOCHS) for o in optimizers]
    accuracy, seconds = [], 0.0
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for rows in torch.randperm(len(data.y)).split(BATCH):
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(last(backbone(data.x[rows])), data.y[rows]).backward()
            for optimizer in optimizers:
                optimizer.step()
        for schedule in schedules:
            schedule.step()
        seconds += time.perf_counter() - start
        with torch.no_grad():
            features = backbone(held_out.x)
            hits = last(features).argmax(1) == held_out.y
        accuracy.append(hits.double().mean().item())
    return Training(accuracy, seconds, features)


def intra_class_angles(features: Tensor, labels: Tensor) -> list[Tensor]:
    """By class, the angle in degrees between the features of every two samples of it."""
    directions = F.normalize(features.double(), dim=1)
    angles = []
    for label in labels.unique():
        own = directions[labels == label]
        upper = torch.triu_indices(len(own), len(own), offset=1)
        cosines = (own @ own.T)[upper[0], upper[1]].clamp(-1, 1)
        angles.append(torch.rad2deg(torch.acos(cosines)))
    return angles


def compare(progress: Callable[[str], None]) -> list[Result]:
    """Tunes and trains both heads, on one thread: the layers are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compare(progress)
    finally:
        torch.set_num_threads(threads)


def _compare(progress: Callable[[str], None]) -> list[Result]:
    data, validation, test = load()
    results = []
    for head in HEADS:
        reached = dict.fromkeys(RATES, 0.0)
        for rate in RATES:
            for seed in TUNING_SEEDS:
                progress(f"{head} head: learning rate {rate}, seed {seed}")
                reached[rate] += train(head, rate, seed, data, validation).accuracy[-1]
        best = max(reached, key=reached.get)
        trainings, variability, angles = [], [], []
        for seed in SEEDS:
            progress(f"{head} head: seed {seed}")
            trainings.append(train(head, best, seed, data, test))
            by_class = intra_class_angles(trainings[-1].features, test.y)
            variability.append(mean(a.mean().item() for a in by_class))
            angles += by_class
        results.append(Result(head, best, trainings, torch.cat(angles), variability))
    return results


def spread(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values)
