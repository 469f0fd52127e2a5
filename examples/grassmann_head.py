"""A Grassmann head in place of a linear one, on scikit-learn's digits.

    python examples/grassmann_head.py [--dim K] [--quick]

Trains a small network whose classes are K-dimensional subspaces, and prints what a linear head has
no word for: how much of each class's features its subspace holds, and which classes' subspaces are
close to each other (the cosine of the smallest principal angle).
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import weft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=4, help="dimension of each subspace")
    parser.add_argument("--quick", action="store_true", help="two epochs only")
    given = parser.parse_args()
    epochs = 2 if given.quick else 30
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        torch.tensor(images, dtype=torch.float32) / 16,
        torch.tensor(labels),
        test_size=0.3,
        random_state=0,
        stratify=labels,
    )
    backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    head = weft.nn.GrassmannClassifier(64, 10, given.dim)
    # Parameters on no manifold move as under torch.optim.SGD, so one optimizer serves the model.
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = weft.optim.RiemannianSGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(head(backbone(x[batch])), y[batch], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
        schedule.step()
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

    with torch.no_grad():
        features = F.normalize(backbone(x_test), dim=1)
        accuracy = (head(features).argmax(1) == y_test).double().mean()
        bases = head.weight.mT  # (10, 64, K)
        kept = weft.subspace_project(features, bases).square().sum(-1)  # (N, 10)
        print(f"test accuracy {accuracy:.1%}")
        print("share of a class's features that its own subspace holds, and the closest other:")
        cosines = torch.linalg.matrix_norm(bases.mT[:, None] @ bases[None], ord=2)
        cosines.fill_diagonal_(0)
        for digit in range(10):
            own = kept[y_test == digit, digit].mean()
            other = int(cosines[digit].argmax())
            print(f"  {digit}: {own:.1%}   nearest {other}, cosine {cosines[digit, other]:.2f}")


if __name__ == "__main__":
    main()
