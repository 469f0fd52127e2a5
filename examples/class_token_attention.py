"""What a class token looks at, on scikit-learn's two photographs.

    python examples/class_token_attention.py [--quick] [--out FOLDER]

Trains a small vision transformer to tell from which of the two photographs a grey crop of 64 x 64
pixels comes; places enter as a learned mixture of Gaussians of their distance
(``weft.DistanceBias``), so that what is learned on crops holds for any size. Then it runs on the
whole photographs, 4240 patches each, and asks the last layer for the attention that the class token
pays to every patch: ``return_key_sums`` with a one-hot ``query_weight``, without the matrix of all
pairs. It prints the accuracy on crops of parts that training never saw, compares with the plain
formula, and draws the attention over the photographs into FOLDER (out/ if not given).
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.cli.console import Console

CROP, PATCH, WIDTH, HEADS, DEPTH = 64, 8, 64, 4, 3
STEPS, BATCH, RATE = 600, 64, 2e-3
TEST_SHARE = 1 / 3  # of the width of each photograph, at its right


class Block(nn.Module):
    """Attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.weight = nn.Parameter(torch.zeros(HEADS, 2))
        self.sigma = nn.Parameter(torch.tensor([[1.0, 4.0]]).repeat(HEADS, 1))

    def operands(self, x: Tensor, grid: tuple[int, int]):
        """Query, key and value (B, heads, tokens, D), and the bias of places."""
        qkv = self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return *qkv, weft.DistanceBias(self.weight, self.sigma, grid, extra=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        query, key, value, bias = self.operands(x, grid)
        out = weft.attention(query, key, value, bias=bias).transpose(1, 2).flatten(2)
        x = x + self.out(out)
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        maps = self.patches(images)
        x = maps.flatten(2).mT
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1), tuple(maps.shape[2:])

    def forward(self, images: Tensor) -> Tensor:
        x, grid = self.tokens(images)
        for block in self.blocks:
            x = block(x, grid)
        return self.head(x[:, 0])

    def last_operands(self, images: Tensor):
        """What the attention of the last layer multiplies."""
        x, grid = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x, grid)
        return *self.blocks[-1].operands(x, grid), grid


def photographs() -> list[Tensor]:
    """Two grey photographs, (427, 640) each, with mean 0 and variance 1."""
    grey = [torch.tensor(image).float().mean(2) for image in load_sample_images().images]
    return [(x - x.mean()) / x.std() for x in grey]


def crops(photos: list[Tensor], n: int, test: bool) -> tuple[Tensor, Tensor]:
    """n crops with random brightness, contrast and mirroring, and their photographs."""
    labels = torch.randint(2, (n,))
    images = []
    for label in labels.tolist():
        height, width = photos[label].shape
        border = int(width * (1 - TEST_SHARE))
        low, high = (border, width - CROP) if test else (0, border - CROP)
        top, left = int(torch.randint(height - CROP, ())), int(torch.randint(low, high, ()))
        crop = photos[label][top : top + CROP, left : left + CROP]
        crop = crop * (0.7 + 0.6 * torch.rand(())) + 0.5 * torch.randn(())
        images.append(crop.flip(1) if torch.rand(()) < 0.5 else crop)
    return torch.stack(images)[:, None], labels


def train(network: Transformer, photos: list[Tensor], steps: int, advance) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        images, labels = crops(photos, BATCH, test=False)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(f"step {step + 1} of {steps}, loss {loss.item():.3f}")


@torch.no_grad()
def class_token_attention(network: Transformer, photo: Tensor) -> tuple[Tensor, Tensor]:
    """(heads, rows, columns): the share of its attention that the class token pays to each patch;
    and that it pays to itself, (heads,)."""
    query, key, value, bias, grid = network.last_operands(_whole_patches(photo))
    first = torch.zeros(1, 1, query.shape[2])
    first[..., 0] = 1
    start = time.perf_counter()
    _, sums = weft.attention(query, key, value, bias=bias, return_key_sums=True, query_weight=first)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    scores = query @ key.mT * query.shape[-1] ** -0.5 + bias.to_dense()
    plain = scores.softmax(-1)
    _ = plain @ value
    theirs = time.perf_counter() - start
    difference = float((plain[:, :, 0] - sums).abs().max())
    print(
        f"{query.shape[2]} tokens: weft {1e3 * ours:.0f} ms, all pairs "
        f"{1e3 * theirs:.0f} ms and {plain.nbytes / 2**20:.0f} MB of weights; "
        f"largest difference of the class token's attention {difference:.1e}"
    )
    return sums[0, :, 1:].unflatten(1, grid), sums[0, :, 0]


def _whole_patches(photo: Tensor) -> Tensor:
    height, width = (n - n % PATCH for n in photo.shape)
    return photo[None, None, :height, :width]


def draw(photos: list[Tensor], maps: list[Tensor], accuracy: float, folder: Path) -> Path:
    """Each photograph, its attention averaged over heads, and the two heads that differ most."""
    from weft.benchmarks.plots import INK, new_figure, pyplot

    figure, axes = new_figure(2, 4, (13, 5.4))
    names = ["photograph", "class token, mean of the heads", "its most focused head", "its widest"]
    for row, (photo, heads) in enumerate(zip(photos, maps, strict=True)):
        share = heads.flatten(1) / heads.flatten(1).sum(1, keepdim=True)
        order = (share * share.clamp_min(1e-30).log()).sum(1).argsort(descending=True)
        shown = [None, share.mean(0), share[order[0]], share[order[-1]]]
        image = _whole_patches(photo)[0, 0]
        for place, values, name in zip(axes[row], shown, names, strict=True):
            place.imshow(image, cmap="gray")
            if values is not None:
                heat = values.reshape(1, 1, *heads.shape[1:])
                heat = F.interpolate(heat, image.shape, mode="bilinear")[0, 0]
                place.imshow(heat, cmap="magma", alpha=0.65, vmax=float(heat.quantile(0.995)))
            place.set(xticks=[], yticks=[])
            place.grid(False)
            if row == 0:
                place.set_title(name, fontsize=10, loc="left")
    figure.suptitle(
        f"Which photograph? Test crops {accuracy:.1%} right; what the class token attends to",
        x=0.012,
        ha="left",
        fontweight="bold",
        fontsize=12,
        color=INK,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "class_token_attention.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    options = parser.parse_args()
    torch.manual_seed(0)
    photos, network = photographs(), Transformer()
    steps = 60 if options.quick else STEPS
    with Console().progress(steps) as advance:
        train(network, photos, steps, advance)
    network.eval()
    with torch.no_grad():
        images, labels = crops(photos, 1000, test=True)
        accuracy = (network(images).argmax(1) == labels).double().mean().item()
    print(f"test accuracy {accuracy:.1%} (1000 crops of parts that training never saw)")
    maps = []
    for name, photo in zip(("china", "flower"), photos, strict=True):
        heads, own = class_token_attention(network, photo)
        top = heads.mean(0).flatten().topk(heads[0].numel() // 10).values.sum()
        print(
            f"{name}: the class token keeps {own.mean():.1%} for itself; a tenth of the patches "
            f"gets {top / heads.mean(0).sum():.0%} of the rest"
        )
        maps.append(heads)
    print(f"picture: {draw(photos, maps, accuracy, options.out)}")


if __name__ == "__main__":
    main()
