"""The Gaussian mixture mask and its attention against the published form, pair by pair."""

import math

import pytest
import torch

from weft.nn import GaussianMaskAttention, GaussianMixtureMask
from weft.ops.cases import randn

HEIGHT, WIDTH, HEADS, K = 3, 4, 2, 3
N = HEIGHT * WIDTH


def published(mask):
    """The authors' ``exp(-d^2) ** (1/2) ** (1 / (sigma^2 + 1e-5))``, one pair at a time."""
    total = []
    for h in range(HEADS):
        for i in range(N):
            for j in range(N):
                (y, x), (v, u) = divmod(i, WIDTH), divmod(j, WIDTH)
                base = math.exp(-((y - v) ** 2 + (x - u) ** 2)) ** 0.5
                total.append(
                    sum(
                        mask.alpha[k, h, 0, 0] * base ** (1 / (mask.sigma[k, h, 0, 0] ** 2 + 1e-5))
                        for k in range(K)
                    )
                )
    return torch.stack(total).view(HEADS, N, N)


def check(ours, expected, inputs):
    torch.testing.assert_close(ours, expected)
    upstream = randn(*ours.shape, dtype=torch.float64, seed=7)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_mask_is_the_published_one():
    torch.manual_seed(0)
    mask = GaussianMixtureMask((HEIGHT, WIDTH), HEADS, K, dtype=torch.float64)
    mask.sigma.data = 0.5 + randn(K, HEADS, 1, 1, dtype=torch.float64).abs()
    check(mask(), published(mask), list(mask.parameters()))


def test_attention_multiplies_the_scores():
    torch.manual_seed(0)
    dim, width = 6, 5
    options = {"head_dim": width, "num_gaussians": K, "dtype": torch.float64}
    layer = GaussianMaskAttention(dim, (HEIGHT, WIDTH), HEADS, **options)
    layer.mask.sigma.data = 0.5 + randn(K, HEADS, 1, 1, dtype=torch.float64).abs()
    x = randn(2, N, dim, dtype=torch.float64).requires_grad_()
    factor, parts = published(layer.mask), layer.to_qkv(x).view(2, N, 3, HEADS, width)
    rows = []
    for b in range(2):
        for i in range(N):
            heads = []
            for h in range(HEADS):
                q, k, v = parts[b, i, 0, h], parts[b, :, 1, h], parts[b, :, 2, h]
                exps = torch.stack(
                    [(factor[h, i, j] * (q @ k[j]) / math.sqrt(width)).exp() for j in range(N)]
                )
                heads.append((exps[:, None] * v).sum(0) / exps.sum())
            rows.append(layer.to_out(torch.cat(heads)))
    check(layer(x), torch.stack(rows).view(2, N, dim), [x, *layer.parameters()])


def test_wide_gaussians_are_plain_attention():
    layer = GaussianMaskAttention(8, 3, 2, 4, 1)
    torch.nn.init.constant_(layer.mask.sigma, 1e6)
    torch.nn.init.ones_(layer.mask.alpha)
    x = randn(2, 9, 8)
    parts = layer.to_qkv(x).view(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(*parts)
    torch.testing.assert_close(layer(x), layer.to_out(plain.transpose(1, 2).flatten(2)))


def test_refuses():
    for match, make in [
        ("grid_size must be", lambda: GaussianMixtureMask(0, 2)),
        ("grid_size must be", lambda: GaussianMixtureMask((3, 3, 3), 2)),
        ("num_gaussians must be", lambda: GaussianMixtureMask(3, 2, 0)),
        ("head_dim must be", lambda: GaussianMaskAttention(8, 3, 2, 0)),
        ("x must be", lambda: GaussianMaskAttention(8, 3, 2)(randn(2, 8, 8))),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
