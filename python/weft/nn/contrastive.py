"""Contrastive losses of papers on ``weft.contrastive_loss``: similarities are never stored."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import at_least_float32, check_features, check_label_vector
from weft.ops.pairwise.cross_entropy import contrastive_loss

KINDS = ("infonce", "supcon", "sigmoid")
LARGEST_SCALE = 100.0


class ContrastiveLoss(nn.Module):
    r"""InfoNCE, CLIP, SimCLR, supervised contrast or SigLIP, with a fixed or a learned temperature.

    With :math:`s_{ij} = \cos(x_i, y_j) / \tau` and the positives P(i) of row i,

    .. math::
        \ell_i = \log \sum_j e^{s_{ij}} - \frac{1}{|P(i)|} \sum_{j \in P(i)} s_{ij}
        \quad \text{or, sigmoid,} \quad
        \ell_i = -\sum_j \log \sigma(z_{ij} (s_{ij} + b)), \; z_{ij} = \pm 1

    =========================================  ====================================================
    ``ContrastiveLoss()``                      InfoNCE; given one matrix NT-Xent (SimCLR): rows i
                                               and i + N/2 are two views of one sample
    ``ContrastiveLoss(symmetric=True,          CLIP: the mean of both directions from one product
    learn_temperature=True)``
    ``ContrastiveLoss("supcon")``              positives are the rows of equal labels
    ``ContrastiveLoss("sigmoid", 0.1,          SigLIP: every pair is a classification of its own;
    learn_temperature=True)``                  the bias b is learned from -10
    =========================================  ====================================================

    Args:
        kind: infonce, supcon or sigmoid.
        temperature: :math:`\tau` > 0, of the beginning where it is learned.
        symmetric: the mean of the losses of the rows of x and of the rows of y.
        learn_temperature: make the logarithm of 1 / tau a parameter, ``log_scale``; as in CLIP
            1 / tau is not let above 100.
        normalize: divide the features by their norms; without it s is the product over tau.

    Shapes: x ``(N, D)``; y ``(M, D)`` or None; labels ``(N,)`` int64 or a pair of them for x and y;
    loss ``()``.

    Raises:
        ValueError: an unknown kind, a temperature out of range, shapes that do not match.
        TypeError: dtypes that differ or are not supported.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
    equation 4; Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", ICML 2020, equation 1; Radford et al., "Learning Transferable Visual Models
    From Natural Language Supervision", ICML 2021, figure 3; Khosla et al., "Supervised Contrastive
    Learning", NeurIPS 2020, equation 2; Zhai et al., "Sigmoid Loss for Language Image
    Pre-Training", ICCV 2023, equation 1.
    """

    def __init__(
        self,
        kind: str = "infonce",
        temperature: float = 0.07,
        *,
        symmetric: bool = False,
        learn_temperature: bool = False,
        normalize: bool = True,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        check_temperature(temperature)
        self.kind, self.temperature = kind, float(temperature)
        self.symmetric, self.normalize = symmetric, normalize
        self.log_scale = self.bias = None
        if learn_temperature:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
            if kind == "sigmoid":
                self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        labels: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.normalize:
            x, y = unit(x), None if y is None else unit(y)
        temperature = self.temperature
        if self.log_scale is not None:
            temperature = 1 / self.log_scale.exp().clamp(max=LARGEST_SCALE)
        return contrastive_loss(
            x,
            y,
            kind=self.kind,
            labels=labels,
            temperature=temperature,
            symmetric=self.symmetric,
            bias=self.bias,
        )

    def extra_repr(self) -> str:
        learned = ", learned" if self.log_scale is not None else ""
        return f"{self.kind!r}, temperature={self.temperature}{learned}, symmetric={self.symmetric}"


class SupConLoss(nn.Module):
    r"""Supervised contrast between all views of all samples, as its authors' code computes it.

    .. math::
        L = \frac{\tau}{\tau_0} \frac{1}{BV} \sum_i \Big( \log \sum_{j \ne i} e^{s_{ij}}
            - \frac{1}{|P(i)|} \sum_{j \in P(i)} s_{ij} \Big), \quad s = x x^\top / \tau

    over the BV rows x; P(i) are the other rows with the label of i. A row without any adds 0.

    Args:
        temperature: :math:`\tau` > 0.
        base_temperature: :math:`\tau_0` > 0.
        normalize: divide the features by their norms, which the authors' network does itself.

    Shapes: features ``(B, V, D)``, labels ``(B,)`` int64 (None: every sample is its own class,
    which is SimCLR), loss ``()``.

    Raises:
        ValueError: temperatures out of range, shapes that do not match.
        TypeError: features that are not floating-point, labels that are not int64.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2.
    """

    def __init__(
        self, temperature: float = 0.07, base_temperature: float = 0.07, *, normalize: bool = True
    ):
        super().__init__()
        check_temperature(temperature)
        check_temperature(base_temperature, "base_temperature")
        self.temperature, self.base_temperature = float(temperature), float(base_temperature)
        self.normalize = normalize

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        check_features("features", features)
        if features.dim() != 3:
            raise ValueError(f"features must be (B, V, D), got {tuple(features.shape)}")
        B, V, D = features.shape
        if labels is None:
            labels = torch.arange(B, device=features.device)
        check_label_vector("labels", labels, features)
        x = features.reshape(B * V, D)
        x = unit(x) if self.normalize else x
        total = contrastive_loss(
            x,
            kind="supcon",
            labels=labels.repeat_interleave(V),
            temperature=self.temperature,
            reduction="sum",
        )
        return self.temperature / self.base_temperature * total / max(B * V, 1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, base_temperature={self.base_temperature}"


class PatchNCELoss(nn.Module):
    r"""Each patch of a translated image recognises the patch of the input at the same place.

    .. math::
        L = \frac{1}{BS} \sum_{b,s} -\log
            \frac{e^{\cos(q_{bs}, k_{bs}) / \tau}}{\sum_{t} e^{\cos(q_{bs}, k_{bt}) / \tau}}

    Negatives are the other patches of the same image; gradients do not flow into the keys.

    Args:
        temperature: :math:`\tau` > 0.
        all_negatives: the patches of all images are negatives (for translation of single images,
            whose batch is of crops of one).
        normalize: divide the features by their norms.

    Shapes: queries and keys ``(B, S, D)``, loss ``()``. Sum the losses of the encoder's layers.

    Raises:
        ValueError: a temperature out of range, shapes that do not match.
        TypeError: features that are not floating-point or differ in dtype.

    Source: Park et al., "Contrastive Learning for Unpaired Image-to-Image Translation", ECCV 2020,
    equations 3 and 4.
    """

    def __init__(
        self, temperature: float = 0.07, *, all_negatives: bool = False, normalize: bool = True
    ):
        super().__init__()
        check_temperature(temperature)
        self.temperature = float(temperature)
        self.all_negatives, self.normalize = all_negatives, normalize

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        check_features("queries", queries)
        if queries.dim() != 3 or keys.shape != queries.shape:
            raise ValueError(
                "queries and keys must be of one shape (B, S, D), "
                f"got {tuple(queries.shape)} and {tuple(keys.shape)}"
            )
        keys = keys.detach()
        if self.normalize:
            queries, keys = unit(queries), unit(keys)
        if self.all_negatives:
            queries, keys = queries.flatten(0, 1)[None], keys.flatten(0, 1)[None]
        losses = [
            contrastive_loss(q, k, temperature=self.temperature)
            for q, k in zip(queries, keys, strict=True)
        ]
        return sum(losses) / max(len(losses), 1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, all_negatives={self.all_negatives}"


class ConVIRTLoss(nn.Module):
    r"""Images and texts recognise each other, with a weight for each direction.

    .. math::
        L = \frac1N \sum_i \lambda \, \ell_i^{v \to u} + (1 - \lambda) \, \ell_i^{u \to v}, \qquad
        \ell_i^{v \to u} = -\log \frac{e^{\cos(v_i, u_i) / \tau}}{\sum_j e^{\cos(v_i, u_j) / \tau}}

    Both directions come from one product where lambda is 1/2 (CLIP), else from one each.

    Args:
        temperature: :math:`\tau` > 0.
        weight: lambda, from 0 to 1.

    Shapes: images v and texts u ``(N, D)``, loss ``()``.

    Raises:
        ValueError: numbers out of range, shapes that do not match.
        TypeError: features that are not floating-point or differ in dtype.

    Source: Zhang et al., "Contrastive Learning of Medical Visual Representations from Paired Images
    and Text", MLHC 2022, equations 2 to 4.
    """

    def __init__(self, temperature: float = 0.1, weight: float = 0.75):
        super().__init__()
        check_temperature(temperature)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {weight}")
        self.temperature, self.weight = float(temperature), float(weight)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        if images.shape != texts.shape:
            raise ValueError(
                "images and texts must be of one shape (N, D), "
                f"got {tuple(images.shape)} and {tuple(texts.shape)}"
            )
        v, u = unit(images), unit(texts)
        if self.weight == 0.5:
            return contrastive_loss(v, u, temperature=self.temperature, symmetric=True)
        there = contrastive_loss(v, u, temperature=self.temperature)
        back = contrastive_loss(u, v, temperature=self.temperature)
        return self.weight * there + (1 - self.weight) * back

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, weight={self.weight}"


class CMCLoss(nn.Module):
    r"""Contrast between any number of views of one batch of samples.

    .. math::
        L = \sum_{(a, b)} L(V_a, V_b) + L(V_b, V_a), \qquad
        L(V_a, V_b) = \frac1N \sum_i -\log
            \frac{e^{\cos(a_i, b_i) / \tau}}{\sum_j e^{\cos(a_i, b_j) / \tau}}

    over all pairs of views ("full") or those with the first ("core"). Negatives are the other
    samples of the batch; the authors' code draws them from a memory of past features.

    Args:
        temperature: :math:`\tau` > 0.
        graph: full or core.

    Shapes: a sequence of at least two views ``(N, D)``, loss ``()``.

    Raises:
        ValueError: numbers out of range, an unknown graph, fewer than two views, shapes that do not
            match.
        TypeError: features that are not floating-point or differ in dtype.

    Source: Tian et al., "Contrastive Multiview Coding", ECCV 2020, equations 3, 4, 7 and 8.
    """

    def __init__(self, temperature: float = 0.07, graph: str = "full"):
        super().__init__()
        check_temperature(temperature)
        if graph not in ("full", "core"):
            raise ValueError(f"graph must be full or core, got {graph!r}")
        self.temperature, self.graph = float(temperature), graph

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        if len(views) < 2 or any(view.shape != views[0].shape for view in views):
            shapes = [tuple(view.shape) for view in views]
            raise ValueError(f"views must be at least two of one shape (N, D), got {shapes}")
        units = [unit(view) for view in views]
        centers = range(1 if self.graph == "core" else len(units))
        losses = [
            contrastive_loss(units[a], other, temperature=self.temperature, symmetric=True)
            for a in centers
            for other in units[a + 1 :]
        ]
        return 2 * sum(losses)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, graph={self.graph!r}"


def unit(x: Tensor) -> Tensor:
    """Rows of norm 1 in the dtype of x, computed in float32 or wider."""
    check_features("features", x)
    return F.normalize(at_least_float32(x), dim=-1).to(x.dtype)


def check_temperature(temperature: float, name: str = "temperature") -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {temperature}")
