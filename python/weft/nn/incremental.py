"""Classes that arrive over time, without samples of those before: features are made up instead."""

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, check_labels, full_precision
from weft.nn.class_statistics import ClassStatistics
from weft.nn.mahalanobis import cholesky


def translate_features(
    features: Tensor,
    labels: Tensor,
    means: Tensor,
    past: Sequence[int] | Tensor,
    *,
    metric: str = "cosine",
) -> tuple[Tensor, Tensor]:
    r"""Features of past classes, made from those of new ones by moving their centroid.

    .. math::
        \hat f^{\,p} = f(x) + \mu_p - \mu_n, \qquad y(x) = n = \arg\max_{n'} \mathrm{sim}(\mu_p,
        \mu_{n'})

    Each past class p takes the features of the new class that resembles it most. Of the past only
    the centroids are kept; a linear classifier is then trained on the features of the new classes
    and on these.

    Args:
        features: ``(N, D)``, of the new classes.
        labels: ``(N,)`` int64, their classes.
        means: ``(C, D)``, centroids of all classes so far, as of
            :attr:`weft.nn.ClassStatistics.mean`.
        past: the classes p to make features of.
        metric: similarity of centroids: ``"cosine"``, as published, or ``"euclidean"``, the
            smallest distance, as in the published code.

    Returns:
        The features ``(M, D)`` and their labels ``(M,)``, in the order of ``past``: as many of
        each past class as there are of the new class that it resembles. M follows the data.

    Raises:
        ValueError: shapes, labels or past classes outside the means, no new sample, a metric that
            is none.
        TypeError: tensors that are not floating-point, labels that are not int64.

    Source: Petit et al., "FeTrIL: Feature Translation for Exemplar-Free Class-Incremental
    Learning", WACV 2023, the feature translation.
    """
    check_features("means", means)
    if means.dim() != 2:
        raise ValueError(f"means must be (C, D), got {tuple(means.shape)}")
    check_features("features", features, means.shape[1])
    if features.dim() != 2 or not len(features):
        raise ValueError(f"features must be (N, D) with N >= 1, got {tuple(features.shape)}")
    check_labels("labels", labels, (len(features),), len(means))
    past = torch.as_tensor(past, device=labels.device)
    past = past.long() if not past.numel() else past
    check_labels("past", past, (past.numel(),), len(means))
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    new = labels.unique()
    wide = at_least_float32(means)
    with full_precision(means):
        if metric == "cosine":
            directions = F.normalize(wide, dim=1)
            source = new[(directions[past] @ directions[new].mT).argmax(1)]
        else:
            difference = wide[past, None] - wide[new]
            source = new[difference.square().sum(-1).argmin(1)]
    which, sample = (labels == source[:, None]).nonzero(as_tuple=True)
    shift = (wide[past] - wide[source]).to(features.dtype)
    return features[sample] + shift[which], past[which]


def sample_class_features(
    statistics: ClassStatistics,
    per_class: int,
    *,
    mean_scale: float | Tensor = 1.0,
    ridge: float = 1e-4,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Features drawn from the Gaussian of each class, to align a classifier without its data.

    .. math::
        f \sim \mathcal N(s_c \, \mu_c, \Sigma_c + \epsilon I)

    Args:
        statistics: of the classes, with a covariance of each ``"class"``, or with none: the
            variances of the features are then used. Classes without samples are left out.
        per_class: n, samples of each class, >= 0.
        mean_scale: s, one for all or ``(C,)``; the published code shrinks the means of older
            classes, by 0.9 to 1.
        ridge: epsilon, >= 0.
        generator: of the random numbers, on the device of the statistics.

    Returns:
        Features ``(S n, D)`` of the S classes with samples, class by class, and their labels
        ``(S n,)`` int64.

    Raises:
        ValueError: another covariance, a number, scale or ridge out of range.

    Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a
    Pre-trained Model", ICCV 2023, the classifier alignment.
    """
    if statistics.kind not in ("class", None):
        raise ValueError(
            f"statistics must keep a covariance of each 'class' or None, got {statistics.kind!r}"
        )
    if not isinstance(per_class, int) or per_class < 0:
        raise ValueError(f"per_class must be an integer >= 0, got {per_class!r}")
    if not ridge >= 0:
        raise ValueError(f"ridge must be >= 0, got {ridge}")
    mean = statistics.mean
    C, D = mean.shape
    scale = torch.as_tensor(mean_scale, dtype=mean.dtype, device=mean.device)
    if scale.shape not in ((), (C,)):
        raise ValueError(f"mean_scale must be a number or ({C},), got {tuple(scale.shape)}")
    seen = (statistics.count > 0).nonzero()[:, 0]
    mean = (mean * scale.reshape(-1, 1))[seen]
    covariance = statistics.covariance()[seen]
    noise = torch.randn(
        len(seen), per_class, D, dtype=mean.dtype, device=mean.device, generator=generator
    )
    with full_precision(mean):
        if statistics.kind == "class":
            noise = noise @ cholesky(covariance, ridge).mT
        else:
            noise = noise * (covariance + ridge).sqrt()[:, None]
    features = (mean[:, None] + noise).reshape(-1, D)
    return features, seen.repeat_interleave(per_class)


def logit_normalized_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    task_sizes: Sequence[int] | None = None,
) -> Tensor:
    r"""Cross entropy of logits divided by their norm: magnitudes cannot grow, only directions.

    .. math::
        L = \mathrm{CE}\Big( \frac{l}{\tau \, \lVert l \rVert}, y \Big), \qquad
        \lVert l \rVert = \frac1T \sum_t \lVert l_t \rVert_2 + 10^{-7}

    with :math:`l_t` the logits of the classes of task t.

    Args:
        logits: ``(B, C)``.
        labels: ``(B,)`` int64.
        temperature: :math:`\tau`, > 0.
        task_sizes: number of classes of each task, in order, C in all; None: one task.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes, labels outside the classes, task sizes that do not add up to C.
        TypeError: logits that are not floating-point, labels that are not int64.

    Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a
    Pre-trained Model", ICCV 2023, the logit normalization.
    """
    check_features("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be (B, C), got {tuple(logits.shape)}")
    C = logits.shape[1]
    check_labels("labels", labels, logits.shape[:1], C)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    sizes = [C] if task_sizes is None else list(task_sizes)
    if sum(sizes) != C or min(sizes) < 1:
        raise ValueError(f"task_sizes must be >= 1 and add up to {C}, got {sizes}")
    wide = at_least_float32(logits)
    norms = [task.norm(dim=1, keepdim=True) for task in wide.split(sizes, 1)]
    norm = torch.cat(norms, 1).mean(1, keepdim=True) + 1e-7
    return F.cross_entropy(wide / (temperature * norm), labels)


def slow_learner_groups(
    backbone: nn.Module | Iterable[nn.Parameter],
    head: nn.Module | Iterable[nn.Parameter],
    lr: float,
    *,
    slow: float = 0.01,
) -> list[dict]:
    """Parameter groups of an optimizer under which a pretrained backbone learns slowly.

    Args:
        backbone: learns at ``slow * lr``; left out where ``slow`` is 0.
        head: learns at ``lr``.
        lr: learning rate, >= 0.
        slow: from 0 to 1.

    Returns:
        Groups for any ``torch.optim.Optimizer``, of the parameters that require a gradient.

    Raises:
        ValueError: rates out of range, a parameter in both.

    Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a
    Pre-trained Model", ICCV 2023, the slow learner.
    """
    if not lr >= 0 or not 0 <= slow <= 1:
        raise ValueError(f"lr must be >= 0 and slow from 0 to 1, got {lr} and {slow}")
    slowly, quickly = (
        [p for p in (m.parameters() if isinstance(m, nn.Module) else m) if p.requires_grad]
        for m in (backbone, head)
    )
    if {id(p) for p in slowly} & {id(p) for p in quickly}:
        raise ValueError("backbone and head share a parameter")
    groups = [{"params": quickly, "lr": lr}]
    return [{"params": slowly, "lr": slow * lr}, *groups] if slow else groups
