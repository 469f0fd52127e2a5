"""Counts, means and scatter of classes that arrive in batches."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.nn.checks import check_features, check_labels, check_sizes, full_precision

COVARIANCES = (None, "diagonal", "tied", "full")


class _Moments(NamedTuple):
    count: Tensor
    mean: Tensor
    m2: Tensor


def segment_stats(x: Tensor, labels: Tensor, num_classes: int, *, covariance: bool) -> _Moments:
    """Moments of one batch: sums over the sorted samples, which repeat bit for bit."""
    order = labels.argsort(stable=True)
    x, labels = x[order], labels[order]
    count = torch.bincount(labels, minlength=num_classes)
    total = torch.segment_reduce(x, "sum", lengths=count, initial=0)
    mean = total / count.clamp(min=1)[:, None]
    residual = x - mean[labels]
    if not covariance:
        m2 = torch.segment_reduce(residual.square(), "sum", lengths=count, initial=0)
        return _Moments(count, mean, m2)
    parts = residual.split(count.tolist())
    return _Moments(count, mean, torch.stack([part.mT @ part for part in parts]))


class KeepsPrecision(nn.Module):
    """Its floating-point buffers stay float32 or wider when a model is cast to half precision."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(buffer.device)
        return self


class ClassStatistics(KeepsPrecision):
    r"""Count, mean and scatter of each class, over any number of batches.

    Batches are merged by the exact formulas for n, the mean and M2, so that their sizes and their
    order matter to rounding alone:

    .. math::
        \mu = \mu_a + \frac{n_b}{n} \delta, \quad
        M = M_a + M_b + \frac{n_a n_b}{n} \delta \delta^\top, \quad \delta = \mu_b - \mu_a

    Args:
        in_features: D.
        num_classes: C, with those that have no sample yet.
        covariance: what is kept of the scatter around the means. ``None``: nothing.
            ``"diagonal"``: ``(C, D)``. ``"tied"``: one ``(D, D)`` for all classes. ``"full"``:
            ``(C, D, D)``.
        device, dtype: of the means; float64 or float32. A cast of the module to half precision
            leaves them as they are.

    Attributes:
        count: ``(C,)`` int64.
        mean: ``(C, D)``; 0 for a class without samples.
        m2: sums of (products of) deviations from the means; None if not kept.

    Raises:
        ValueError: sizes, an unknown covariance, labels outside the classes.
        TypeError: a dtype that is neither float64 nor float32.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        covariance: str | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes)
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance must be one of {COVARIANCES}, got {covariance!r}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float64, torch.float32):
            raise TypeError(f"dtype must be float64 or float32, got {dtype}")
        C, D = num_classes, in_features
        shapes = {None: None, "diagonal": (C, D), "tied": (D, D), "full": (C, D, D)}
        shape = shapes[covariance]
        self.in_features, self.num_classes, self.kind = in_features, num_classes, covariance
        self.register_buffer("count", torch.zeros(C, dtype=torch.int64, device=device))
        self.register_buffer("mean", torch.zeros(C, D, dtype=dtype, device=device))
        m2 = None if shape is None else torch.zeros(shape, dtype=dtype, device=device)
        self.register_buffer("m2", m2)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds samples: features ``(N, D)`` of any floating-point dtype, labels ``(N,)`` int64."""
        check_features("features", features, self.in_features)
        if features.dim() != 2:
            raise ValueError(f"features must be (N, D), got {tuple(features.shape)}")
        check_labels("labels", labels, (len(features),), self.num_classes)
        with full_precision(features):
            x = features.to(self.mean.dtype)
            full = self.kind == "full"
            batch = segment_stats(x, labels, self.num_classes, covariance=full)
            m2 = batch.m2
            if self.kind == "tied":
                residual = x - batch.mean[labels]
                m2 = residual.mT @ residual
            self._merge(batch.count, batch.mean, m2)

    @torch.no_grad()
    def merge(self, other: "ClassStatistics") -> None:
        """Adds the samples of another one, such as that of another process."""
        if (other.kind, other.mean.shape) != (self.kind, self.mean.shape):
            raise ValueError(
                f"other must keep {self.kind} of {tuple(self.mean.shape)}, "
                f"got {other.kind} of {tuple(other.mean.shape)}"
            )
        with full_precision(self.mean):
            self._merge(other.count, other.mean, other.m2)

    @torch.no_grad()
    def merge_ranks(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds up the samples of all processes of a group, on each of them to the same bits.

        Call it once, after the last batch: afterwards each process has the samples of all.
        """
        own = [buffer for buffer in (self.count, self.mean, self.m2) if buffer is not None]
        every = []
        for buffer in own:
            parts = [torch.empty_like(buffer) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, buffer, group=group)
            every.append(parts)
            buffer.zero_()
        with full_precision(self.mean):
            for count, mean, *m2 in zip(*every, strict=True):
                self._merge(count, mean, m2[0] if m2 else None)

    def _merge(self, count: Tensor, mean: Tensor, m2: Tensor | None) -> None:
        total = self.count + count
        share = count / total.clamp(min=1).to(self.mean.dtype)
        delta = mean - self.mean
        weight = (share * self.count)[:, None]
        if self.kind == "diagonal":
            self.m2 += m2 + weight * delta.square()
        elif self.kind == "tied":
            self.m2 += m2 + (weight * delta).mT @ delta
        elif self.kind == "full":
            self.m2 += m2 + (weight * delta)[:, :, None] * delta[:, None]
        self.mean += share[:, None] * delta
        self.count += count

    def covariance(self, correction: int = 1) -> Tensor:
        """The covariance kept: M2 over (n - correction), of which nothing is left for n <= 1.

        Args:
            correction: degrees of freedom that a mean costs: 1 unbiased, 0 of the largest
                likelihood. A tied covariance loses it once for each class with samples.
        """
        if self.m2 is None:
            raise ValueError("covariance is None: these statistics keep no scatter")
        left = self.count - correction * (self.count > 0)
        if self.kind == "tied":
            return self.m2 / left.sum().clamp(min=1)
        return self.m2 / left.clamp(min=1).view(-1, *[1] * (self.m2.dim() - 1))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"covariance={self.kind!r}"
        )
