"""Alignment of the patches of an image with its labels by conditional transport."""

import math

import torch
from torch import Tensor, nn

from weft.nn.checks import check_features
from weft.ops.transport.conditional_transport import conditional_transport


class PatchCTLoss(nn.Module):
    r"""The conditional transport between the patches of each image and the labels that it has.

    .. math::
        L = \frac{1}{\lvert B^+ \rvert} \sum_{b \in B^+} \Big(
            \rho \, \mathop{\mathrm{mean}}_i \sum_{j \in y_b} \pi_{bij} C_{bij}
            + (1 - \rho) \mathop{\mathrm{mean}}_{j \in y_b} \sum_i \kappa_{bij} C_{bij} \Big),
        \qquad C = 1 - \cos(x_{bi}, e_j)

    with the navigators :math:`\pi` (softmax over the labels of the image) and :math:`\kappa`
    (softmax over its patches) of cosines over ``temperature``, and :math:`B^+` the images that have
    a label. The paper adds this to a classification loss. Its code was never published: how the
    two directions are weighed is ``rho`` here, and one half of their sum by default.

    Args:
        temperature: > 0.
        rho: share of the direction from patches to labels, in [0, 1].
        learnable: whether the logarithm of the temperature is a parameter, ``log_temperature``.
        device, dtype: of that parameter.

    Shapes: patches ``(B, N, D)``, labels ``(M, D)`` or ``(B, M, D)`` embeddings, targets ``(B, M)``
    weights >= 0, of bool, integer or float (1 for the labels that an image has), patch_weights
    ``(B, N)`` >= 0 (0 for padding); loss ``()``, 0 without labels.

    Raises:
        ValueError: numbers out of range, shapes that do not match, negative weights.
        TypeError: embeddings that are not floating-point or differ in dtype.

    Source: Li et al., "PatchCT: Aligning Patch Set and Label Set with Conditional Transport for
    Multi-Label Image Classification", ICCV 2023, section 3.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        rho: float = 0.5,
        *,
        learnable: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if not 0 <= rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {rho}")
        self.initial_temperature, self.rho = float(temperature), float(rho)
        if learnable:
            self.log_temperature = nn.Parameter(torch.empty((), device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.register_parameter("log_temperature", None)

    def reset_parameters(self) -> None:
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.initial_temperature))

    @property
    def temperature(self) -> float | Tensor:
        if self.log_temperature is None:
            return self.initial_temperature
        return self.log_temperature.exp()

    def forward(
        self,
        patches: Tensor,
        labels: Tensor,
        targets: Tensor,
        patch_weights: Tensor | None = None,
    ) -> Tensor:
        check_features("patches", patches)
        check_features("labels", labels, patches.shape[-1])
        weights = targets if targets.is_floating_point() else targets.to(patches.dtype)
        value = conditional_transport(
            patches, labels, patch_weights, weights, rho=self.rho, temperature=self.temperature
        )
        return value.sum() / (targets > 0).any(-1).sum().clamp(min=1)

    def extra_repr(self) -> str:
        learnable = self.log_temperature is not None
        return f"temperature={self.initial_temperature}, rho={self.rho}, learnable={learnable}"
