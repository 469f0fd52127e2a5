"""Counts, means and scatter of classes that arrive in batches, as the state of a module."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.nn.checks import check_features, check_labels, check_sizes, full_precision
from weft.ops.stats.moments import SegmentStats
from weft.ops.stats.segment_stats import segment_stats

COVARIANCES = (None, "shared", "class")


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

    The state of a module around :func:`weft.segment_stats`: it is saved, moved and copied with the
    model. Batches are merged exactly, so that their sizes and their order matter to rounding alone.

    Args:
        in_features: D.
        num_classes: C, with those that have no sample yet.
        covariance: what is kept of the scatter around the means beside that of each feature.
            ``None``: nothing. ``"shared"``: one ``(D, D)`` for all classes. ``"class"``:
            ``(C, D, D)``.
        device, dtype: of the means; float64 or float32. A cast of the module to half precision
            leaves them as they are.

    Attributes:
        count: ``(C,)`` int64.
        mean: ``(C, D)``; 0 for a class without samples.
        m2: ``(C, D)``, sums of squared deviations from the means.
        scatter: sums of products of deviations; None if not kept.

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
        self.in_features, self.num_classes, self.kind = in_features, num_classes, covariance
        empty = SegmentStats.empty(
            num_classes, in_features, covariance=covariance or False, dtype=dtype, device=device
        )
        for name, value in empty._asdict().items():
            self.register_buffer(name, value)

    @property
    def stats(self) -> SegmentStats:
        """The statistics as one value."""
        return SegmentStats(self.count, self.mean, self.m2, self.scatter)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds samples: features ``(N, D)`` of any floating-point dtype, labels ``(N,)`` int64."""
        check_features("features", features, self.in_features)
        if features.dim() != 2:
            raise ValueError(f"features must be (N, D), got {tuple(features.shape)}")
        check_labels("labels", labels, (len(features),), self.num_classes)
        with full_precision(features):
            self._become(
                segment_stats(
                    features.to(self.mean.dtype),
                    labels,
                    self.num_classes,
                    covariance=self.kind or False,
                    previous=self.stats,
                )
            )

    @torch.no_grad()
    def merge(self, other: "ClassStatistics") -> None:
        """Adds the samples of another one, such as that of another process."""
        if (other.kind, other.mean.shape) != (self.kind, self.mean.shape):
            raise ValueError(
                f"other must keep {self.kind} of {tuple(self.mean.shape)}, "
                f"got {other.kind} of {tuple(other.mean.shape)}"
            )
        with full_precision(self.mean):
            self._become(self.stats.merge(other.stats))

    @torch.no_grad()
    def merge_ranks(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds up the samples of all processes of a group, on each of them to the same bits.

        Call it once, after the last batch: afterwards each process has the samples of all.
        """
        every = []
        for buffer in self.stats:
            parts = [None] * dist.get_world_size(group)
            if buffer is not None:
                parts = [torch.empty_like(buffer) for _ in parts]
                dist.all_gather(parts, buffer, group=group)
            every.append(parts)
        first, *others = (SegmentStats(*parts) for parts in zip(*every, strict=True))
        with full_precision(self.mean):
            for other in others:
                first = first.merge(other)
            self._become(first)

    def _become(self, stats: SegmentStats) -> None:
        """In place: buffers keep their dtype, and whoever holds them sees the new values."""
        for buffer, value in zip(self.stats, stats, strict=True):
            if buffer is not None:
                buffer.copy_(value)

    def covariance(self, ddof: float = 1) -> Tensor:
        """The covariance kept, or without one the variances ``(C, D)``; 0 where nothing is left.

        Args:
            ddof: degrees of freedom that the mean of a class costs: 1 unbiased, 0 of the largest
                likelihood. A shared covariance loses it once for each class with samples.
        """
        if self.kind is None:
            return self.stats.variance(ddof)
        return self.stats.covariance_matrix(ddof)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"covariance={self.kind!r}"
        )
