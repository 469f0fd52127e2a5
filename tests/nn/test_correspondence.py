"""Fused maps, joint components and nearest places against their formulas in float64."""

import pytest
import torch
from torch.nn import functional as F

from weft.nn import fuse_features, joint_pca, nearest_correspondence
from weft.ops.cases import randn


def maps(B=2, D=5, H=4, W=3, seed=0):
    return randn(B, D, H, W, dtype=torch.float64, seed=seed)


def test_cosines_of_fused_maps():
    """The cosine of fused features is the weighted mean of those of the parts."""
    one, two = maps(), maps(D=7, seed=1)
    fused = fuse_features(one, two, weights=[0.3, 0.7]).flatten(2)
    assert fused.shape == (2, 12, 12)
    cosine = lambda t: F.normalize(t.flatten(2), dim=1).mT @ F.normalize(t.flatten(2), dim=1)  # noqa: E731
    expected = (0.09 * cosine(one) + 0.49 * cosine(two)) / (0.09 + 0.49)
    torch.testing.assert_close(cosine(fused), expected)
    torch.testing.assert_close(fuse_features(one), F.normalize(one, dim=1))
    small = maps(H=2, W=2, seed=2)
    resized = F.interpolate(small, (4, 3), mode="bilinear")
    torch.testing.assert_close(fuse_features(one, small), fuse_features(one, resized))


def test_joint_components():
    """Those of all places of both maps; all of them keep every distance."""
    source, target = maps(), maps(H=2, seed=1) + 3
    both = torch.cat([source.flatten(2), target.flatten(2)], 2).mT
    found = torch.cat([t.flatten(2) for t in joint_pca(source, target, 2)], 2).mT
    centered = both - both.mean(1, keepdim=True)
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    expected = u[..., :2] * s[:, None, :2]
    torch.testing.assert_close(found.abs(), expected.abs())
    every = torch.cat([t.flatten(2) for t in joint_pca(source, target, 5)], 2).mT
    torch.testing.assert_close(torch.cdist(every, every), torch.cdist(both, both))


@pytest.mark.parametrize("masked", [False, True])
def test_nearest_place_by_loops(masked):
    source, target = maps().requires_grad_(), maps(H=5, W=2, seed=1).requires_grad_()
    masks = [torch.ones(2, 4, 3, dtype=torch.bool), torch.ones(2, 5, 2, dtype=torch.bool)]
    if masked:
        masks[0][0, 1:], masks[1][:, ::2] = False, False
    found = nearest_correspondence(source, target, *(masks if masked else ()))
    total = 0
    for b in range(2):
        for i in range(12):
            place = divmod(i, 3)
            index = found.index[(b, *place)]
            if not masks[0][(b, *place)]:
                assert index == -1 and found.similarity[(b, *place)] == -torch.inf
                continue
            cosines = {
                j: F.cosine_similarity(source[(b, slice(None), *place)], target[b, :, r, c], 0)
                for j, (r, c) in enumerate((r, c) for r in range(5) for c in range(2))
                if masks[1][b, r, c]
            }
            best = max(cosines, key=lambda j: cosines[j].item())
            assert index == best
            torch.testing.assert_close(found.similarity[(b, *place)], cosines[best])
            total = total + cosines[best]
    own = found.similarity[masks[0]].sum() if masked else found.similarity.sum()
    for one, other in zip(
        torch.autograd.grad(own, (source, target)),
        torch.autograd.grad(total, (source, target)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_bad_arguments():
    x = maps()
    with pytest.raises(ValueError, match="weights must be 2 numbers >= 0"):
        fuse_features(x, x, weights=[1.0])
    with pytest.raises(ValueError, match="at least one"):
        fuse_features()
    with pytest.raises(ValueError, match="components must be from 1 to 5"):
        joint_pca(x, x, 6)
    with pytest.raises(ValueError, match="target must have the samples and channels"):
        nearest_correspondence(x, x[:, :3])
    with pytest.raises(TypeError, match="source_mask must be bool"):
        nearest_correspondence(x, x, torch.ones(2, 4, 3))
