"""Bags of visual words whose vocabulary is renewed while it is used."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, check_sizes, full_precision
from weft.nn.prototype_classifiers import squared_distances

PAIRS_AT_A_TIME = 1 << 22


class VisualWords(nn.Module):
    r"""Describes a feature map by how surely each visual word is found in it: a target to predict.

    .. math::
        a_{bpk} = \mathrm{softmax}_k \big( {-\lVert f_{bp} - v_k \rVert^2} \, \beta / \bar d \big),
        \qquad
        \text{bow}_{bk} = \frac{\max_p a_{bpk}}{\sum_{k'} \max_p a_{bpk'}}

    The places p are those of the map without its border; :math:`\bar d` is a moving average of the
    squared distance to the nearest word, so that :math:`\beta` has no unit. In training each call
    replaces the oldest words by one vector of each image, the mean of a random 3 x 3 neighbourhood,
    after the bags are formed. No gradient is computed: the features are a teacher's. Assignments
    are formed for some images at a time.

    Args:
        num_words: K, at least the size of a batch.
        channels: D.
        sharpness: :math:`\beta` > 0.
        momentum: of the moving average, in [0, 1).
        device, dtype: of the vocabulary.

    Attributes:
        vocabulary: ``(K, D)``, a buffer, the positive part of the standard normal distribution at
            the beginning; ``oldest`` and ``mean_distance`` are buffers, ``()``.

    Shapes: features ``(B, D, H, W)`` with H, W >= 3 (>= 5 in training), bags ``(B, K)`` in float32
    or wider, whose rows sum to 1.

    Raises:
        ValueError: sizes or numbers out of range, a feature map that is too small, a batch larger
            than the vocabulary.
        TypeError: features that are not floating-point.

    Source: Gidaris et al., "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised
    Learning", CVPR 2021, section 3.
    """

    def __init__(
        self,
        num_words: int,
        channels: int,
        *,
        sharpness: float = 15.0,
        momentum: float = 0.99,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(num_words=num_words, channels=channels)
        if not sharpness > 0:
            raise ValueError(f"sharpness must be > 0, got {sharpness}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.num_words, self.channels = num_words, channels
        self.sharpness, self.momentum = float(sharpness), float(momentum)
        vocabulary = torch.empty(num_words, channels, device=device, dtype=dtype)
        self.register_buffer("vocabulary", vocabulary)
        self.register_buffer("mean_distance", vocabulary.new_empty(()))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.vocabulary).clamp_(min=0)
        self.mean_distance.fill_(0.5)
        self.oldest.zero_()

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        check_features("features", features)
        least = 5 if self.training else 3
        if (
            features.dim() != 4
            or features.shape[1] != self.channels
            or min(features.shape[2:]) < least
        ):
            raise ValueError(
                f"features must be (B, {self.channels}, H, W) with H, W >= {least}, "
                f"got {tuple(features.shape)}"
            )
        if self.training and len(features) > self.num_words:
            raise ValueError(f"features must be at most {self.num_words} maps, got {len(features)}")
        with full_precision(features):
            inner = at_least_float32(features)[:, :, 1:-1, 1:-1]
            if self.training and len(inner):
                nearest = torch.cat([d.amin(2) for d in self._distances(inner)])
                self.mean_distance.lerp_(nearest.mean().to(self.mean_distance), 1 - self.momentum)
            scale = -self.sharpness / self.mean_distance
            bags = [(scale * d).softmax(2).amax(1) for d in self._distances(inner)]
            if self.training and len(inner):
                self._renew(inner)
            bags = torch.cat(bags) if bags else inner.new_zeros(0, self.num_words)
        return F.normalize(bags, p=1, dim=1)

    def _distances(self, features: Tensor):
        """To all words, ``(b, P, K)``, some images at a time."""
        places = features.flatten(2).mT
        per_image = places.shape[1] * self.num_words
        for some in places.split(max(1, PAIRS_AT_A_TIME // per_image)):
            if len(some):
                yield squared_distances(some, self.vocabulary)

    def _renew(self, features: Tensor) -> None:
        means = F.avg_pool2d(features, 3, stride=1).flatten(2)
        B, _, places = means.shape
        rows = torch.arange(B, device=means.device)
        place = torch.randint(places, (B,), device=means.device)
        words = (self.oldest + rows) % self.num_words
        self.vocabulary[words] = means[rows, :, place].to(self.vocabulary.dtype)
        self.oldest.copy_((self.oldest + B) % self.num_words)

    def extra_repr(self) -> str:
        return f"num_words={self.num_words}, channels={self.channels}, sharpness={self.sharpness}"


class VisualWordPredictor(nn.Module):
    r"""Predicts bags of visual words by weights that are generated from the words themselves.

    .. math::
        \text{logits} = \kappa \, s \, \widehat{G(\hat V)}^\top, \qquad
        G = \text{linear}, \text{batch norm}, \text{ReLU}, \text{linear}

    with a hat for division by the norm: the vocabulary changes, its head with it. Train it with
    ``torch.nn.functional.cross_entropy(logits, bags)``.

    Args:
        channels: D of the words.
        in_features: E of the student's features.
        hidden: of G; None takes 2 E, as published.
        kappa: > 0.
        device, dtype: of the parameters.

    Shapes: features ``(B, E)``, vocabulary ``(K, D)``, logits ``(B, K)``.

    Raises:
        ValueError: sizes or numbers out of range, shapes that do not match.
        TypeError: features that are not floating-point.

    Source: Gidaris et al., "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised
    Learning", CVPR 2021, section 3.3.
    """

    def __init__(
        self,
        channels: int,
        in_features: int,
        hidden: int | None = None,
        *,
        kappa: float = 8.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        hidden = 2 * in_features if hidden is None else hidden
        check_sizes(channels=channels, in_features=in_features, hidden=hidden)
        if not kappa > 0:
            raise ValueError(f"kappa must be > 0, got {kappa}")
        self.channels, self.in_features, self.kappa = channels, in_features, float(kappa)
        factory = {"device": device, "dtype": dtype}
        self.generator = nn.Sequential(
            nn.Linear(channels, hidden, bias=False, **factory),
            nn.BatchNorm1d(hidden, **factory),
            nn.ReLU(),
            nn.Linear(hidden, in_features, **factory),
        )

    def forward(self, features: Tensor, vocabulary: Tensor) -> Tensor:
        check_features("features", features, self.in_features)
        check_features("vocabulary", vocabulary, self.channels)
        weights = F.normalize(self.generator(F.normalize(vocabulary, dim=1)), dim=1)
        return F.linear(self.kappa * features, weights)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, in_features={self.in_features}, kappa={self.kappa}"
